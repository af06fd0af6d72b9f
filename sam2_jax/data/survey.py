"""Read whole sources once, every frame and every mask, and see what is in them or broken.

Opening a source looks at its files but decodes none; here all is decoded, as training would do it.
A clip becomes a few numbers (`look`); `tally` adds them up.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt64

from sam2_jax.data.sources import VideoSource, in_blocks
from sam2_jax.data.workers import end_with_trainer
from sam2_jax.types import UserError

CHUNK = 16  # frames read at a time, fewer where they and their masks take more than
BUDGET = 64 * 2**20  # bytes
FLAT = 0  # in place of the hash of a frame of one colour, which many clips begin or end with


class Clip(NamedTuple):
    """What was found in one clip."""

    index: int  # in its source
    frames: int  # that could be read
    objects: list[int]  # ids, ascending
    visible: list[int]  # number of objects on every frame whose masks can be read
    areas: Float[np.ndarray, " m"]  # shares of the frame that masks cover, 0-1, none empty
    hollow: int  # masks without a pixel though their object is said to be visible
    hashes: UInt64[np.ndarray, " n"]  # of the decoded frames, none twice
    unreadable: list[str]  # what the source says of files that it cannot read
    mismatches: list[str]  # where the source contradicts itself; training would stop there


class Faulty:
    """Faults of a clip, each once: a broken mask is met when asking for ids, then for masks."""

    def __init__(self, name: str) -> None:
        """`name`: of the clip."""
        self._name = name
        self.unreadable: list[str] = []
        self.mismatches: list[str] = []

    def add(self, frame: int, error: Exception) -> None:
        """An error raised by a frame. Only a UserError is one that training can leave out."""
        texts, text = self.unreadable, str(error)
        if not isinstance(error, UserError):
            texts = self.mismatches
            text = f"clip {self._name}, frame {frame}: {type(error).__name__}: {error}"
        if text not in texts:
            texts.append(text)

    def size(self, frame: int, found: tuple[int, ...], listed: tuple[int, int]) -> None:
        """A frame or its masks may have another size (height, width) than their clip."""
        if found != listed:
            (height, width), (h, w) = found, listed
            text = f"clip {self._name}, frame {frame}: {width} x {height}, expected {w} x {h}"
            if text not in self.mismatches:
                self.mismatches.append(text)


def look(source: VideoSource, index: int) -> Clip:
    """Read every frame and every mask of a clip, in pieces of bounded size.

    What reading raises is part of the result.
    """
    video = source.video(index)
    faults = Faulty(video.name)
    seen: dict[int, tuple[int, ...]] = {}
    for t in range(video.num_frames):
        try:
            seen[t] = source.objects(index, t)
        except Exception as error:  # whatever it is, the user wants to know where
            faults.add(t, error)
    ids = sorted(set().union(*seen.values()))
    areas: list[float] = []
    hashes: dict[int, int] = {}
    hollow = 0
    most = max(1, BUDGET // (video.height * video.width))  # masks in memory
    step = max(1, min(CHUNK, most // (len(ids) + 3)))
    for start in range(0, video.num_frames, step):
        frames = range(start, min(start + step, video.num_frames))
        wanted = sorted(set().union(*(seen.get(t, ()) for t in frames)))
        for first in range(0, len(wanted) or 1, most):
            group = wanted[first : first + most]
            for t, image, masks in _read(source, index, frames, group, faults):
                faults.size(t, image.shape[:2], (video.height, video.width))
                faults.size(t, masks.shape[1:], (video.height, video.width))
                for k, mask in zip(group, masks, strict=True):
                    if covered := np.count_nonzero(mask):
                        areas.append(covered / mask.size)
                    else:
                        hollow += k in seen.get(t, ())
                if t not in hashes:
                    hashes[t] = frame_hash(image)
    return Clip(
        index,
        len(hashes),
        ids,
        [len(objects) for objects in seen.values()],
        np.array(areas, float),
        hollow,
        np.unique(np.array([h for h in hashes.values() if h != FLAT], np.uint64)),
        faults.unreadable,
        faults.mismatches,
    )


def _read(
    source: VideoSource, index: int, frames: Sequence[int], ids: Sequence[int], faults: Faulty
) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "o h w"]]]:
    """Frames and masks; where some cannot be read, the others."""
    try:
        yield from zip(frames, *source.read(index, frames, ids), strict=True)
    except Exception as error:
        if len(frames) == 1:
            faults.add(frames[0], error)
            return
        for t in frames:
            yield from _read(source, index, [t], ids, faults)


def frame_hash(frame: UInt8[np.ndarray, "h w 3"]) -> int:
    """64 bits of the pixels and their shape; `FLAT` where all pixels are alike."""
    corners = frame[:: max(1, len(frame) - 1), :: max(1, frame.shape[1] - 1)]
    # The corners alone first: comparing all pixels takes longer than hashing them.
    if (corners == frame[0, 0]).all() and (frame == frame[0, 0]).all():
        return FLAT
    digest = hashlib.blake2b(np.ascontiguousarray(frame).data, digest_size=8)
    digest.update(repr(frame.shape).encode())
    return int.from_bytes(digest.digest(), "little")


_sources: Sequence[VideoSource] = ()  # of a worker process


def _hold(sources: Sequence[VideoSource]) -> None:
    global _sources
    _sources = sources
    end_with_trainer()


def _work(job: tuple[int, int]) -> tuple[int, Clip]:
    return job[0], look(_sources[job[0]], job[1])


def look_at(
    sources: Sequence[VideoSource], jobs: Sequence[tuple[int, int]], workers: int
) -> Iterator[tuple[int, Clip]]:
    """`look` at (number of the source, index of the clip) pairs; results in the same order.

    Args:
        sources: to read.
        jobs: what of them.
        workers: processes; 0: threads of this one, which start at once but share a lock.
    """
    if not workers:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            yield from in_blocks(threads, lambda job: (job[0], look(sources[job[0]], job[1])), jobs)
        return
    # Not forked: threads of JAX may hold locks that nobody would ever release in the copy.
    spawn = multiprocessing.get_context("spawn")
    chunk = max(1, min(64, len(jobs) // (16 * workers)))
    pool = ProcessPoolExecutor(workers, spawn, _hold, (sources,))
    try:
        yield from pool.map(_work, jobs, chunksize=chunk)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} processes that read was killed, most likely for lack of memory: "
            "give a smaller --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
