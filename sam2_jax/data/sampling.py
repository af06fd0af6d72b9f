"""Which frames and which objects of a clip a training example shows. Pure."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

NEVER = 1e-300  # weight of a direction of probability 0: behind all others


class Sampling(NamedTuple):
    """How examples are drawn from a clip. The defaults are the reference's."""

    num_frames: int
    max_objects: int
    reverse: float = 0.0  # probability of playing backwards
    min_stride: int = 1  # frames of the video from one frame shown to the next, drawn uniformly
    max_stride: int = 1
    later_objects: float = 0.0  # probability that objects may also be first seen on a later frame

    @property
    def span(self) -> int:
        """Fewest frames that a clip must have."""
        return (self.num_frames - 1) * self.min_stride + 1


class Sample(NamedTuple):
    """Frames of a clip in the order they are shown, and the ids of the objects followed."""

    frames: list[int]
    objects: list[int]


def sample_clip(
    rng: np.random.Generator,
    objects_of: Callable[[int], Sequence[int]],
    video_frames: int,
    settings: Sampling,
) -> Sample:
    """Frames at an even stride from a random start, and some of the objects seen on them.

    The first frame shown has a visible object. The objects followed are a random choice of those
    visible there, at most `max_objects`; with probability `later_objects` one of those and a
    random choice of all that are visible on any frame shown.
    The reference redraws start and direction up to 1000 times until something is visible there
    (facebookresearch/sam2@2b90b9f training/dataset/vos_sampler.py, RandomUniformSampler); walking
    through all pairs of them in a weighted random order gives the same distribution and cannot
    miss one.

    Args:
        rng: the only randomness.
        objects_of: ids visible on one frame of the clip.
        video_frames: length of the clip, at least `settings.span`.
        settings: how many frames and objects, and how they are drawn.

    Raises:
        ValueError: the clip is too short, or no start shows an object (`sources.keep_usable`
            leaves such clips out).
    """
    for frames in _candidates(rng, video_frames, settings):
        visible = objects_of(frames[0])
        if not visible:
            continue
        objects = _choose(rng, visible, settings.max_objects)
        if settings.later_objects and rng.random() < settings.later_objects:
            seen = {k for t in frames for k in objects_of(t)} - {objects[0]}
            objects = [objects[0], *_choose(rng, sorted(seen), settings.max_objects - 1)]
        return Sample(frames, objects)
    raise ValueError(
        f"no {settings.num_frames} frames of {video_frames} start with a visible object"
    )


def _candidates(
    rng: np.random.Generator, video_frames: int, settings: Sampling
) -> Iterator[list[int]]:
    """Every way to place the frames, in random order; last a direction of probability 0.

    The order is that of drawing pairs of start and direction without replacement, by weight: the
    smallest of exponential variables divided by the weights is each with its share of them. The
    first pair that shows an object is then drawn from those that do, by weight.
    """
    steps = settings.num_frames - 1
    longest = (video_frames - 1) // steps if steps else 1
    most = min(settings.max_stride, longest)
    if video_frames < settings.span:
        return
    first = int(rng.integers(settings.min_stride, most + 1)) if most > settings.min_stride else most
    # A shorter stride has more starts: only where none of the drawn one shows an object.
    for stride in (first, *(s for s in range(settings.min_stride, most + 1) if s != first)):
        starts = video_frames - steps * stride
        chances = [1 - settings.reverse, settings.reverse] if settings.reverse else [1.0]
        weights = np.maximum(np.repeat(chances, starts), NEVER)
        for place in np.argsort(rng.exponential(size=weights.size) / weights):
            backwards, start = divmod(int(place), starts)
            frames = list(range(start, start + steps * stride + 1, stride))
            yield frames[::-1] if backwards else frames


def _choose(rng: np.random.Generator, ids: Sequence[int], most: int) -> list[int]:
    return [int(k) for k in rng.choice(np.array(ids, int), min(len(ids), most), replace=False)]
