"""Read back what `packing` wrote, and compare it with the index."""

import contextlib
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grain.sources import ArrayRecordDataSource
from tqdm.auto import tqdm

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.packed import open_packed
from sam2_jax.data.packed_format import (
    INDEX,
    MEND,
    Clip,
    Index,
    check_chunk,
    parse_record,
    read_index,
    visible_text,
)
from sam2_jax.data.parallel import run_parallel
from sam2_jax.data.rle import decode_rle
from sam2_jax.types import UserError, listed

BLOCK = 2**20  # bytes read at a time


def check_shard(path: Path, clips: Sequence[Clip], chunk_frames: int, decode: bool) -> None:
    """Read a whole file of packed clips and compare it with its index.

    Args:
        path: of the file.
        clips: those of this file, in order.
        chunk_frames: frames of a record.
        decode: also decode every frame.

    Raises:
        UserError: anything is not as it should be.
    """
    try:
        records: Any = ArrayRecordDataSource(str(path))
        expected = sum(clip.records(chunk_frames) for clip in clips)
        if len(records) != expected:
            raise ValueError(f"it has {len(records)} records, not {expected}")
        for clip in clips:
            _check_clip(records, clip, chunk_frames, decode, path)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is broken ({error}), expected what was packed: {MEND}") from error


def _check_clip(records, clip: Clip, chunk_frames: int, decode: bool, path: Path) -> None:
    size, visible = (clip.height, clip.width), []
    for first in range(0, clip.num_frames, chunk_frames):
        chunk = parse_record(records[clip.record + first // chunk_frames])
        check_chunk(chunk, clip, first, chunk_frames)
        for i, counts in enumerate(chunk.masks):
            where = f"frame {first + i} of {clip.name}"
            data = chunk.frame(i)
            if decode and decode_frame(data).shape != (*size, 3):
                raise ValueError(f"{where} is not of {clip.width} x {clip.height} pixels")
            for k, text in counts.items():
                rle = {"size": list(size), "counts": text}
                decode_rle(rle, *size, f"{path}: object {k} on {where}")
            visible.append(sorted(map(int, counts)))
    if visible_text(visible) != clip.visible:
        raise ValueError(f"clip {clip.name} shows other objects than the index says")


def file_crc(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def verify_packed(root: str | Path, workers: int = 1) -> Index:
    """Read and decode everything in a folder of packed clips.

    Raises:
        UserError: something is missing or broken; every such shard is named.
    """
    folder = Path(root)
    open_packed(folder, key="--output")
    index = read_index(folder / INDEX)
    by_shard: list[list[Clip]] = [[] for _ in index.shards]
    for clip in index.clips:
        by_shard[clip.shard].append(clip)
    todo = {
        n: (folder / shard.file, shard.crc32, by_shard[n]) for n, shard in enumerate(index.shards)
    }
    errors = []
    task = partial(_verify, chunk_frames=index.chunk_frames)
    bar = clips_bar(f"verifying {root}", len(index.clips))
    with contextlib.closing(run_parallel(task, todo, workers)) as results, bar:
        for number, error in results:
            errors += [error] if error else []
            bar.update(len(by_shard[number]))
    if errors:
        raise UserError(f"{len(errors)} of {len(by_shard)} shards are broken: {listed(errors)}")
    return index


def _verify(path: Path, crc: int, clips: list[Clip], chunk_frames: int) -> str:
    try:
        check_shard(path, clips, chunk_frames, decode=True)
        if file_crc(path) != crc:  # between the records
            return f"{path} is broken (another checksum than when it was packed): {MEND}"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}): {MEND}"
    except UserError as error:
        return str(error)
    return ""


def clips_bar(text: str, total: int, done: int = 0) -> tqdm:
    """Clips, and with the same speed throughout the time that is left."""
    return tqdm(desc=text, total=total, initial=done, unit="clip", smoothing=0)
