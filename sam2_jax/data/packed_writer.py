"""Write and check one file of packed clips: see `packed_format` for what is in it."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.packed_format import Clip, build_record, visible_text
from sam2_jax.data.rle import encode_rle
from sam2_jax.data.sources import EncodedSource, Selection, VideoSource
from sam2_jax.types import UserError

MASK_BYTES = 256 * 2**20  # so much of decoded masks is held at a time
SPOOL_BYTES = 64 * 2**20  # a longer clip waits on disk until all of it was read
# Random access to single records. Pictures are compressed already.
WRITER = "group_size:1,uncompressed"
PROBES = 16  # clips of which a frame is looked at to estimate sizes
Stored = Callable[[int, int], bytes]  # clip, frame -> encoded picture


def stored_frames(source: VideoSource) -> Stored | None:
    """A function that gives frames as a source holds them, if it holds pictures."""
    if isinstance(source, Selection):
        inner, indices = stored_frames(source.source), source.indices
        return None if inner is None else lambda index, frame: inner(indices[index], frame)
    return source.encoded if isinstance(source, EncodedSource) else None


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Lossless; a third of the size where the picture is grey."""
    grey = (image == image[..., :1]).all()
    _, data = cv2.imencode(".png", image[..., 0] if grey else image[..., ::-1])
    return data.tobytes()


def encode_chunk(
    source: VideoSource, index: int, frames: Sequence[int]
) -> tuple[list[bytes], list[dict[int, str]]]:
    """Encoded frames of a clip, and RLE counts by id of the objects visible on each.

    Raises:
        UserError: a file cannot be read; or a frame as it is stored is another than `read` gives.
    """
    video, stored = source.video(index), stored_frames(source)
    visible = [source.objects(index, t) for t in frames]
    ids = sorted({k for seen in visible for k in seen})
    at_once = max(1, MASK_BYTES // (len(frames) * video.height * video.width))
    masks: list[dict[int, str]] = [{} for _ in frames]
    images = None
    for start in range(0, len(ids) or 1, at_once):
        some = ids[start : start + at_once]
        images, found = source.read(index, frames, some)
        for i, seen in enumerate(visible):
            for j in (j for j, k in enumerate(some) if k in seen):
                masks[i][some[j]] = encode_rle(found[i, j])["counts"]
    assert images is not None
    if stored is None:
        return [encode_png(image) for image in images], masks
    encoded = [stored(index, t) for t in frames]
    for t, data, image in zip(frames, encoded, images, strict=True):
        if not np.array_equal(decode_frame(data), image):
            raise UserError(
                f"frame {t} of clip {video.name} of {source.name} is not what it was a moment "
                "before: do not change data while they are packed"
            )
    return encoded, masks


@contextmanager
def writing(path: Path):
    """What cannot be written becomes a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter are ArrayRecord's
        raise UserError(
            f"{path} cannot be written ({error}): is there room on the disk? Finished shards are "
            "kept, and the same command goes on from there"
        ) from error


def write_shard(
    path: Path, source: VideoSource, indices: Sequence[int], chunk_frames: int, skip: bool
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Write some clips of a source into one file.

    Args:
        path: of the file; written over.
        source, indices: the clips.
        chunk_frames: frames of a record.
        skip: leave out clips that cannot be read.

    Returns:
        The clips written, as an index has them but for the number of the shard, 0; name of and
        error about each clip left out.

    Raises:
        UserError: a clip cannot be read and is not to be left out; or the file not written.
    """
    clips: list[Clip] = []
    broken: list[tuple[str, str]] = []
    record = 0
    with writing(path):
        writer = ArrayRecordWriter(str(path), WRITER)
    try:
        for index in indices:
            # A clip is read to its end before any of it is written: it may be broken there
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(path.parent)) as spool:
                try:
                    visible, sizes = _spool_clip(spool, path, source, index, chunk_frames)
                except Unreadable as error:
                    if not skip:
                        raise UserError(str(error)) from error
                    broken.append((source.video(index).name, str(error)))
                    continue
                with writing(path):
                    spool.seek(0)
                    for size in sizes:
                        writer.write(spool.read(size))
            clips.append(Clip(*source.video(index), 0, record, visible))
            record += len(sizes)
    finally:
        with writing(path):
            writer.close()
    return clips, broken


class Unreadable(Exception):
    """A clip of the source cannot be read, which is no fault of the disk that is written to."""


def _spool_clip(
    spool, path: Path, source: VideoSource, index: int, chunk_frames: int
) -> tuple[str, list[int]]:
    """Write the records of a clip to a file; who is visible when, and sizes of the records."""
    video = source.video(index)
    visible, sizes = [], []
    for first in range(0, video.num_frames, chunk_frames):
        some = range(first, min(first + chunk_frames, video.num_frames))
        try:
            frames, masks = encode_chunk(source, index, some)
        except UserError as error:
            raise Unreadable(str(error)) from error
        record = build_record(video, first, frames, masks)
        with writing(path):
            spool.write(record)
        visible += [sorted(counts) for counts in masks]
        sizes.append(len(record))
    return visible_text(visible), sizes


def bytes_per_pixel(source: VideoSource) -> float:
    """An estimate of what an encoded frame takes, from a few frames."""
    stored, found = stored_frames(source), []
    for index in np.linspace(0, len(source) - 1, min(PROBES, len(source))).astype(int).tolist():
        video = source.video(index)
        t = video.num_frames // 2
        try:
            data = stored(index, t) if stored else encode_png(source.read(index, [t], [])[0][0])
        except UserError:  # it will be met again
            continue
        found.append(len(data) / (video.height * video.width))
    return float(np.mean(found)) if found else 1.0
