"""From a config to a source, and from a source to an endless stream of batches.

Everything random is decided per position of one global stream of clips: position n has the same
clip, frames and flip for any number of processes and of workers. Processes deal the stream out
among themselves, so that together they see what one process alone would see.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, UInt8

from sam2_jax.data.folders import eval_folder, train_folder
from sam2_jax.data.sampling import sample_clip
from sam2_jax.data.sources import VideoSource
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.data.tfds import PreparedSource
from sam2_jax.data.transforms import flip, object_masks, resize_frames
from sam2_jax.types import Batch, UserError

SOURCES = ("folder", "synthetic", "tfds")
TRAIN_STREAM, EVAL_STREAM = 0, 1  # of rendered clips
# Batches of one process or worker in preparation. Grain's defaults (16 threads, 500 elements)
# would hold 12 GB of 8-frame clips of 1024 pixels.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
POLL = 2.0  # seconds between a worker's looks at its trainer


class Example(NamedTuple):
    """One element of a batch."""

    images: UInt8[np.ndarray, "t h w 3"]
    masks: Bool[np.ndarray, "t o h w"]
    valid: Bool[np.ndarray, " o"]


class MakeExample:
    """Clip index -> Example. A class and not a closure: loader processes receive it pickled."""

    def __init__(
        self,
        source: VideoSource,
        side: int,
        num_frames: int,
        max_objects: int,
        hflip: float,
        reverse: float,
    ) -> None:
        """`side`: pixels; `hflip`, `reverse`: probabilities."""
        self._source, self._side = source, side
        self._num_frames, self._max_objects = num_frames, max_objects
        self._hflip, self._reverse = hflip, reverse

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """Sample, decode, flip, resize."""
        index = int(index)
        sample = sample_clip(
            rng,
            lambda frame: self._source.labels(index, [frame])[0],
            self._source.video(index).num_frames,
            self._num_frames,
            self._max_objects,
            self._reverse,
        )
        frames, labels = self._source.read(index, sample.frames)
        if rng.random() < self._hflip:
            frames, labels = flip(frames, labels)
        masks, valid = object_masks(labels, sample.objects, self._max_objects, self._side)
        return Example(resize_frames(frames, self._side), masks, valid)


def stack(examples: Sequence[Example]) -> Batch:
    """Examples to one batch, new leading axis."""
    return Batch(*(np.stack(arrays) for arrays in zip(*examples, strict=True)))


def make_train_source(config: Any) -> VideoSource:
    """Open the training clips that `config.data` names, and check them.

    The source `tfds` does not look at `config.data.root`: `config.finish` has turned it into
    `folder` where that is given.

    Raises:
        UserError: nothing there, or something there is broken.
    """
    data = config.data
    if _kind(config) == "synthetic":
        length = max(data.num_frames, data.synthetic.eval_frames)
        return _synthetic(config, data.synthetic.num_clips, length, config.seed, TRAIN_STREAM)
    if data.source == "tfds":
        return PreparedSource("train", data.num_frames)
    return train_folder(data.root, data.num_frames, holdout=not data.eval_root)


def make_eval_source(config: Any) -> VideoSource:
    """Open the evaluation clips that belong to a config. Rendered ones are equal for every seed.

    Raises:
        UserError: nothing there, or something there is broken.
    """
    data = config.data
    if _kind(config) == "synthetic":
        rendered = data.synthetic
        return _synthetic(config, rendered.eval_clips, rendered.eval_frames, 0, EVAL_STREAM)
    if data.source == "tfds" and not data.eval_root:
        return PreparedSource("validation")
    return eval_folder(data.root, data.eval_root)


def _kind(config: Any) -> str:
    if config.data.source not in SOURCES:
        raise UserError(
            f"config.data.source is {config.data.source!r}, expected one of {', '.join(SOURCES)}"
        )
    return config.data.source


def _synthetic(
    config: Any, num_clips: int, num_frames: int, seed: int, stream: int
) -> SyntheticSource:
    return SyntheticSource(
        num_clips=num_clips,
        num_frames=num_frames,
        size=config.model.resolution,
        max_objects=config.data.synthetic.max_objects,
        seed=seed,
        stream=stream,
        speed=config.data.synthetic.speed,
    )


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


def make_train_loader(
    config: Any, source: VideoSource, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[Batch]:
    """Endless batches of numpy arrays: this process's share of `config.data.batch_size` videos.

    An epoch visits every clip once, in a new order each time. The iterator's `get_state` and
    `set_state` resume exactly (with the same number of workers). With workers, close the
    iterator: batches come through shared memory.

    Raises:
        UserError: the batch size is not a multiple of the number of processes.
    """
    data = config.data
    if data.batch_size < 1 or data.batch_size % process_count:
        raise UserError(
            f"config.data.batch_size is {data.batch_size}, expected a positive multiple of the "
            f"{process_count} process(es): it counts the videos of all devices together"
        )
    make_example = MakeExample(
        source, config.model.resolution, data.num_frames, data.max_objects, data.hflip, data.reverse
    )
    # Batches are made before the switch to an iterator, else their contents would depend on the
    # number of workers; shuffling comes before repeating, else an epoch would not be a permutation.
    stream = (
        grain.MapDataset.range(len(source))
        .seed(config.seed)
        .shuffle()
        .repeat()
        .random_map(make_example)[process_index::process_count]
        .batch(data.batch_size // process_count, drop_remainder=True, batch_fn=stack)
        .to_iter_dataset(READ)
    )
    if not data.workers:
        return stream
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags when it starts its workers
    options = grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=2)
    return stream.mp_prefetch(options, worker_init_fn=end_with_trainer)
