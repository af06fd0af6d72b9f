"""Which frames and which objects of a clip a training example shows. Pure."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8


class Sample(NamedTuple):
    """Frames of a clip in the order they are shown, and the labels of the objects followed."""

    frames: list[int]
    objects: list[int]


def visible_objects(labels: UInt8[np.ndarray, "h w"]) -> Int[np.ndarray, " o"]:
    """Labels other than background on one frame, ascending."""
    return np.flatnonzero(np.bincount(labels.ravel(), minlength=1)[1:]) + 1


def sample_clip(
    rng: np.random.Generator,
    labels_of: Callable[[int], UInt8[np.ndarray, "h w"]],
    video_frames: int,
    num_frames: int,
    max_objects: int,
    reverse: float,
) -> Sample:
    """Consecutive frames from a random start, backwards with probability `reverse`.

    Objects are a random choice of those visible on the first frame shown, at most `max_objects`.
    The reference redraws the start up to 1000 times until something is visible there
    (facebookresearch/sam2@2b90b9f training/dataset/vos_sampler.py, RandomUniformSampler); walking
    through the starts in random order gives the same distribution and cannot miss one.

    Args:
        rng: the only randomness.
        labels_of: label map of one frame of the clip.
        video_frames: length of the clip, at least `num_frames`.
        num_frames: frames to sample.
        max_objects: the most objects to sample.
        reverse: probability 0-1 of playing backwards.

    Raises:
        ValueError: the clip is too short, or no start shows an object (sources leave such
            clips out).
    """
    starts = rng.permutation(video_frames - num_frames + 1) if video_frames >= num_frames else []
    drawn = [(int(start), bool(rng.random() < reverse)) for start in starts]
    # Second round, the other direction: only where no frame of the first round shows anything.
    for start, backwards in drawn + [(start, not back) for start, back in drawn]:
        frames = list(range(start, start + num_frames))
        if backwards:
            frames.reverse()
        visible = visible_objects(labels_of(frames[0]))
        if len(visible):
            count = min(len(visible), max_objects)
            chosen = rng.choice(visible, count, replace=False)
            return Sample(frames, [int(label) for label in chosen])
    raise ValueError(f"no {num_frames} consecutive frames of {video_frames} start with an object")
