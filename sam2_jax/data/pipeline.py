"""From sources to an endless stream of batches that can be taken up at any position.

Everything random is decided per position of one global stream of clips: position n has the same
clip, frames and pixels for any number of processes and of workers. Processes deal the stream out
among themselves, so that together they see what one process alone would see.
"""

import sys
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data import mixture, sources
from sam2_jax.data.augment import AugmentSettings, augment
from sam2_jax.data.loader import Loader
from sam2_jax.data.sampling import Sampling, sample_clip
from sam2_jax.data.sources import SKIP, STOP, VideoSource
from sam2_jax.types import Batch, UserError


class Part(NamedTuple):
    """One source of the training data and how examples are made of it."""

    name: str
    source: VideoSource
    sampling: Sampling
    augment: AugmentSettings
    batch_size: int  # clips of a batch over all processes
    weight: float = 0.0  # see mixture.Share
    multiplier: float = 1.0

    @property
    def share(self) -> mixture.Share:
        """What the mixture needs to know."""
        return mixture.Share(
            self.name, len(self.source), self.batch_size, self.weight, self.multiplier
        )


class Example(NamedTuple):
    """One element of a batch."""

    images: UInt8[np.ndarray, "t h w 3"]
    masks: Bool[np.ndarray, "t o h w"]
    valid: Bool[np.ndarray, " o"]


def make_example(part: Part, index: int, rng: np.random.Generator, side: int) -> Example:
    """Sample, decode, augment, pad: one clip of a source as the model takes it.

    Args:
        part: source and settings.
        index: of the clip.
        rng: the only randomness.
        side: of the model's input, pixels.

    Raises:
        UserError: a file of the clip cannot be read.
    """
    source, most = part.source, part.sampling.max_objects
    sample = sample_clip(
        rng,
        lambda frame: source.objects(index, frame),
        source.video(index).num_frames,
        part.sampling,
    )
    frames, masks = source.read(index, sample.frames, sample.objects)
    frames, masks = augment(rng, frames, masks, side, part.augment)
    count = masks.shape[1]
    if count < most:
        masks = np.pad(masks, ((0, 0), (0, most - count), (0, 0), (0, 0)))
    return Example(frames, masks, np.arange(most) < count)


class MakeExample:
    """(clip, rng) -> Example. A class and not a closure: loader processes receive it pickled."""

    def __init__(self, part: Part, side: int, on_error: str, max_bad: float) -> None:
        """With `on_error` "skip" another clip takes the place of one that cannot be read."""
        self._part, self._side = part, side
        self._skip, self._max_bad = on_error == SKIP, max_bad
        self._bad: set[int] = set()  # met by this process or worker, each counted once

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The clip's example, or that of the next clip drawn which can be read."""
        count = len(self._part.source)
        while True:
            try:
                return make_example(self._part, int(index), rng, self._side)
            except UserError as error:
                if not self._skip:
                    raise
                self._bad.add(int(index))
                bad = len(self._bad)
                told = f"{bad} of {count} clips of {self._part.name} could not be read"
                # One is let pass in any case, but where no clip is left the search would not end.
                if bad > max(1, self._max_bad * count) or bad == count:
                    raise UserError(
                        f"{told}, more than config.data.max_bad={self._max_bad} allows: {error}"
                    ) from error
                print(f"warning: {told}, another takes its place: {error}", file=sys.stderr)
                # Drawn from the clip's own generator: the same replacement in every run
                index = int(rng.integers(count))


def describe(parts: Sequence[Part], draw: str) -> list[tuple[str, str]]:
    """`(label, value)` lines of the start-up table: every source, its batches and its share."""
    rows = []
    shares = [part.share for part in parts]
    chances = mixture.weights(shares)
    if draw == mixture.RANDOM:  # an epoch draws all batches of all sources: weights only order them
        chances = [share.batches / sum(s.batches for s in shares) for share in shares]
    for part, chance in zip(parts, chances, strict=True):
        rows += [(f"{part.name} {label}", value) for label, value in sources.describe(part.source)]
        frames, objects = part.sampling.num_frames, part.sampling.max_objects
        clips = f"clips of {frames} frames" if frames > 1 else "images"
        text = f"{part.batch_size} {clips}, up to {objects} objects each"
        rows.append((f"{part.name} batch", text))
        if len(parts) > 1:
            epoch = part.share.batches
            rows.append(
                (f"{part.name} share", f"{chance:.1%} of steps, {draw}; {epoch:,} an epoch")
            )
    return rows


class NameClip:
    """(clip, rng) -> names of source and clip."""

    def __init__(self, part: Part) -> None:
        """See `Loader.clips_of`."""
        self._part = part

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """Nothing is drawn."""
        del rng
        return self._part.name, self._part.source.video(int(index)).name


def stack(examples: Sequence[Example]) -> Batch:
    """Examples to one batch, new leading axis."""
    return Batch(*(np.stack(arrays) for arrays in zip(*examples, strict=True)))


def make_loader(
    parts: Sequence[Part],
    *,
    side: int,
    seed: int = 0,
    workers: int = 0,
    draw: str = mixture.INTERLEAVE,
    phases: int = 1,
    on_error: str = STOP,
    max_bad: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """The batches of one process: its share of every batch of the stream.

    Args:
        parts: what to train on; one source, or several (see `mixture`).
        side: of the model's input, pixels.
        seed: of everything random.
        workers: processes that make examples; 0: two threads of this one.
        draw, phases: see `mixture.mix`.
        on_error: "stop", or "skip" clips that cannot be read, up to the share `max_bad`.
        process_index, process_count: of the run.

    Raises:
        UserError: a batch size is not a multiple of the number of processes; weights that cannot
            be.
    """
    shares = [part.share for part in parts]
    streams, names = [], []
    for number, part in enumerate(parts):
        if part.batch_size < 1 or part.batch_size % process_count:
            raise UserError(
                f"config.data.batch_size of {part.name} is {part.batch_size}, expected a positive "
                f"multiple of the {process_count} process(es): it counts the videos of all devices"
            )
        make = MakeExample(part, side, on_error, max_bad)
        named = mixture.clips(part.share, (seed, number), NameClip(part))
        names.append(named.batch(part.batch_size, drop_remainder=True, batch_fn=list))
        # Batches are made before the switch to an iterator, else their contents would depend on
        # the number of workers. Each process has neighbouring clips, so that all of them together
        # have every video at the place of the batch where one process alone has it.
        made = mixture.clips(part.share, (seed, number), make).batch(
            part.batch_size // process_count, drop_remainder=True, batch_fn=stack
        )
        streams.append(made[process_index::process_count])
    all_names = mixture.mix(names, shares, draw, phases, seed)
    return Loader(
        mixture.mix(streams, shares, draw, phases, seed),
        workers,
        lambda position: all_names[position] or [],
        {part.name: len(part.source) for part in parts},
        checksum(parts),
    )


def checksum(parts: Sequence[Part]) -> int:
    """32 bits of the names of all clips, in order."""
    found = 0
    for part in parts:
        for index in range(len(part.source)):
            found = zlib.crc32(f"{part.source.video(index).name}\n".encode(), found)
    return found
