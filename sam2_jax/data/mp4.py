"""Single frames of a video file, by their number.

Frame n is the n-th that a decoder shows when it plays the file from its start. Numbers are turned
into presentation times by the packets of the file, which is read for that but not decoded; then
decoding starts at the last key frame that is not later. With B-frames packets lie in another order
than frames, and pictures may follow a key frame in the file that are shown before it and cannot be
decoded from it (open groups of pictures): their key frame is the one before.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Int64, UInt8

from sam2_jax.data.headers import Header, too_large
from sam2_jax.data.scan import changed
from sam2_jax.types import UserError, listed

MEND = "copy or download it again"
KEPT_INDEXES = 64  # of some kilobytes


class VideoHeader(NamedTuple):
    """What a file says of itself; sides in pixels, as the video is to be shown."""

    num_frames: int
    height: int
    width: int


class FrameIndex(NamedTuple):
    """When frames are shown, and key frames among them, in units of the file's own clock."""

    shown: Int64[np.ndarray, " t"]  # ascending
    keys: Int64[np.ndarray, " k"]  # when key frames are shown, ascending


@contextmanager
def _opened(path: Path) -> Iterator:
    """The container and its video stream; what goes wrong is the file's fault."""
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video in it, expected an mp4, is it whole? {MEND}")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"{path} has a video that no decoder is known for: {MEND}")
            stream.codec_context.thread_count = 1  # loaders run many of these side by side
            yield container, stream
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be decoded ({reason}), is it whole? {MEND}") from error


def read_header(path: Path) -> VideoHeader:
    """Number and size of the frames. Only the first is decoded.

    Raises:
        UserError: the file cannot be opened or decoded, its end is missing, or frames are larger
            than pictures may be.
    """
    with _opened(path) as (container, stream):
        packets = stream.index_entries
        end = max((entry.pos + entry.size for entry in packets), default=0)
        if end > (length := path.stat().st_size):
            raise UserError(
                f"{path} is cut short at {length:,} bytes, its frames go on to {end:,}: {MEND}"
            )
        coded = stream.codec_context
        if fault := too_large(Header(coded.width, coded.height, "video", 8)):
            raise UserError(f"{path} {fault}")
        first = next(container.decode(stream), None)
        if first is None:
            raise UserError(f"{path} has no frame that can be decoded: {MEND}")
        height, width = _upright(first, np.empty((first.height, first.width, 0))).shape[:2]
        if stream.frames:
            return VideoHeader(sum(not entry.is_discard for entry in packets), height, width)
    return VideoHeader(len(_index(path).shown), height, width)  # in fragments: no count in front


def read_frames(path: Path, indices: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode the frames asked for, RGB, in the order asked for; each is decoded once.

    Raises:
        UserError: the file is broken, or has no such frame.
    """
    index = _index(path)
    if beyond := [t for t in indices if not 0 <= t < len(index.shown)]:
        raise UserError(
            f"{path} has {len(index.shown)} frames and none of number {listed(map(str, beyond))}: "
            f"{MEND}, or annotations that belong to it"
        )
    times = [int(index.shown[t]) for t in indices]
    starts = defaultdict(set)
    for time in times:
        starts[int(np.searchsorted(index.keys, time, "right")) - 1].add(time)
    frames: dict[int, np.ndarray] = {}
    with _opened(path) as (container, stream):
        for key, wanted in sorted(starts.items()):
            _decode(container, stream, int(index.keys[key]), wanted, frames)
        # A file may call a frame a key frame that is not (gradual refresh): decode all before it.
        if missing := set(times) - set(frames):
            _decode(container, stream, int(index.keys[0]), missing, frames)
    if missing := [t for t, time in zip(indices, times, strict=True) if time not in frames]:
        raise UserError(
            f"{path} is damaged, frame {listed(map(str, missing))} of {len(index.shown)} cannot be "
            f"decoded: {MEND}"
        )
    return np.stack([frames[time] for time in times])


def _decode(container, stream, start: int, wanted: set[int], frames: dict[int, np.ndarray]) -> None:
    """Decode from a key frame until the last of the times wanted, and keep what is wanted."""
    container.seek(start, stream=stream)
    last = max(wanted)
    for frame in container.decode(stream):
        if frame.pts in wanted:
            frames[frame.pts] = _upright(frame, frame.to_ndarray(format="rgb24"))
        if frame.pts is not None and frame.pts >= last:
            return


def _upright(frame, pixels: np.ndarray) -> np.ndarray:
    """Turned as the file says that the video is to be shown (by degrees, anticlockwise)."""
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def _index(path: Path) -> FrameIndex:
    return _index_of(str(path), changed(path))


@functools.lru_cache(maxsize=KEPT_INDEXES)
def _index_of(path: str, time: int) -> FrameIndex:
    """Read all packets of a file that was last changed at `time`."""
    del time  # part of the key
    shown, keys = [], []
    with _opened(Path(path)) as (container, stream):
        for packet in container.demux(stream):
            if packet.pts is None:  # the empty packet at the end, or a file without times
                continue
            if packet.is_keyframe:
                keys.append(packet.pts)
            if not packet.is_discard:  # cut off by the file's edit list, though decoded
                shown.append(packet.pts)
    if not shown or not keys:
        raise UserError(f"{path} has no frame with a time to it, expected an mp4: {MEND}")
    times, starts = np.unique(np.array(shown, np.int64)), np.unique(np.array(keys, np.int64))
    return FrameIndex(times[times >= starts[0]], starts)
