"""From sources to an endless stream of batches that can be taken up at any position.

Everything random is decided per position of one global stream of clips: position n has the same
clip, frames and pixels for any number of processes and of workers. Processes deal the stream out
among themselves, so that together they see what one process alone would see.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, UInt8

from sam2_jax.data import mixture, sources
from sam2_jax.data.augment import AugmentSettings, augment
from sam2_jax.data.sampling import Sampling, sample_clip
from sam2_jax.data.sources import SKIP, STOP, VideoSource
from sam2_jax.types import Batch, UserError

# Batches of one process or worker in preparation. Grain's defaults (16 threads, 500 elements)
# would hold 12 GB of 8-frame clips of 1024 pixels.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
POLL = 2.0  # seconds between a worker's looks at its trainer
SOME = 50  # clips after which a share of broken ones means something


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
        self._made = self._bad = 0  # of this process or worker

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The clip's example, or that of the next clip drawn which can be read."""
        self._made += 1
        while True:
            try:
                return make_example(self._part, int(index), rng, self._side)
            except UserError as error:
                if not self._skip:
                    raise
                self._bad += 1
                told = f"{self._bad} of {self._made} clips of {self._part.name} could not be read"
                if self._bad > max(1, self._max_bad * max(self._made, SOME)):
                    raise UserError(
                        f"{told}, more than config.data.max_bad={self._max_bad} allows: {error}"
                    ) from error
                print(f"warning: {told}, another takes its place: {error}", file=sys.stderr)
                # Drawn from the clip's own generator: the same replacement in every run
                index = int(rng.integers(len(self._part.source)))


def describe(parts: Sequence[Part], draw: str) -> list[tuple[str, str]]:
    """`(label, value)` lines of the start-up table: every source, its batches and its share."""
    rows = []
    chances = mixture.weights([part.share for part in parts])
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


def end_with_trainer(index: int, count: int) -> None:
    """Let a loader process end soon after its trainer, even one that was killed."""
    del index, count
    # Who started this process, which may be gone by now; os.getppid() would name its heir.
    trainer = multiprocessing.parent_process()
    if trainer is None:
        return

    def watch() -> None:
        while os.getppid() == trainer.pid:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Loader(Iterator[Batch]):
    """Batches from a position of the stream on, without end.

    The position, the number of batches given out, is its whole state, so a run goes on exactly
    with any number of workers and of processes: the stream is not read up to it but cut there.
    """

    def __init__(
        self,
        stream: grain.MapDataset[Batch],
        workers: int,
        names: Callable[[int], list[tuple[str, str]]],
        contents: dict[str, int],
    ) -> None:
        """`names`: (source, clip) of all rows of a batch; `contents`: clips by source.

        With another number of clips it is another stream.
        """
        self._stream, self._workers, self._names = stream, workers, names
        self._contents = contents
        self._position = 0
        self._batches: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        """The next batch. Its arrays may lie in shared memory: copy what is kept."""
        if self._batches is None:
            self._batches = iter(self._open())
        batch = next(self._batches)
        self._position += 1
        return batch

    def _open(self) -> grain.IterDataset[Batch]:
        rest = self._stream[self._position :] if self._position else self._stream
        read = rest.to_iter_dataset(READ)
        if not self._workers:
            return read
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags when it starts its workers
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
        return read.mp_prefetch(options, worker_init_fn=end_with_trainer)

    def source_of(self, position: int) -> str:
        """Name of the source that batch number `position` comes from."""
        return self._names(position)[0][0]

    def clips_of(self, position: int) -> list[str]:
        """Names of the clips of batch number `position`, of all processes.

        Of a clip that cannot be read (`on_error` "skip") its own, not its replacement's.
        """
        return [clip for _, clip in self._names(position)]

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes: JSON, the same on every process."""
        return {"batches": self._position, "clips": self._contents}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after so many batches.

        Raises:
            UserError: the sources have not as many clips as then, so this is another stream.
        """
        if state["clips"] != self._contents:
            raise UserError(
                f"the training data have changed: {json.dumps(state['clips'])} clips at the "
                f"checkpoint, {json.dumps(self._contents)} now; put back what was there, or start "
                "a new --workdir with --config.checkpoint.init_from=OLD_WORKDIR"
            )
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Ends worker processes and gives back their shared memory."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None


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
        # the number of workers.
        streams.append(
            mixture.clips(part.share, (seed, number), make)[process_index::process_count].batch(
                part.batch_size // process_count, drop_remainder=True, batch_fn=stack
            )
        )
    all_names = mixture.mix(names, shares, draw, phases, seed)
    return Loader(
        mixture.mix(streams, shares, draw, phases, seed),
        workers,
        lambda position: all_names[position] or [],
        {part.name: len(part.source) for part in parts},
    )
