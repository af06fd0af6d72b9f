"""Clips packed into few large files, of any source: read here, written by `packing`.

What is in the files: see `packed_format`.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import ArrayRecordDataSource
from jaxtyping import Bool, UInt8

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.lists import choose
from sam2_jax.data.packed_format import (
    INDEX,
    MEND,
    UNFINISHED,
    WANTED,
    Chunk,
    Clip,
    Shard,
    check_chunk,
    parse_record,
    read_index,
    visible_on,
)
from sam2_jax.data.rle import decode_rle
from sam2_jax.data.sources import THREADS, Faults, Video
from sam2_jax.types import UserError

OPEN_SHARDS = 64  # files that a source keeps open; a process may often have 1024


class PackedSource:
    """Clips opened by `open_packed`."""

    def __init__(
        self,
        name: str,
        shards: Sequence[Path],
        clips: Sequence[Clip],
        chunk_frames: int,
        notes: list[str],
    ) -> None:
        """`clips` have passed the checks; `chunk_frames` is the number of frames of a record."""
        self.name, self.notes = name, notes
        self._shards, self._clips, self._chunk_frames = list(shards), list(clips), chunk_frames
        self._opened = functools.lru_cache(OPEN_SHARDS)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files."""
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._opened = functools.lru_cache(OPEN_SHARDS)(self._open)

    def _open(self, shard: int) -> Any:
        return ArrayRecordDataSource(str(self._shards[shard]))

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def video(self, index: int) -> Video:
        """Name, length and size of a clip."""
        return Video(*self._clips[index][:4])

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects visible on a frame, from the index alone."""
        return visible_on(self._clips[index].visible, frame)

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Decode frames and masks of some objects; only the records that hold them are read.

        Raises:
            UserError: a shard is missing or broken; it is named.
        """
        clip = self._clips[index]
        size = (clip.height, clip.width)
        images = np.empty((len(frames), *size, 3), np.uint8)
        masks = np.zeros((len(frames), len(objects), *size), bool)
        chunks = {n: self._chunk(clip, n) for n in {t // self._chunk_frames for t in frames}}
        for i, t in enumerate(frames):
            number, place = divmod(t, self._chunk_frames)
            try:
                images[i] = decode_frame(chunks[number].frame(place))
            except (OSError, ValueError) as error:  # also a picture of another size
                raise self._broken(clip, number, error) from error
            counts = chunks[number].masks[place]
            for j, k in enumerate(objects):
                if found := counts.get(str(k)):
                    where = f"{self._shards[clip.shard]}: object {k} on frame {t} of {clip.name}"
                    rle = {"size": list(size), "counts": found}
                    masks[i, j] = decode_rle(rle, *size, where)
        return images, masks

    def encoded(self, index: int, frame: int) -> bytes:
        """A frame as it is stored: the bytes of the source packed, or a PNG.

        Raises:
            UserError: a shard is missing or broken; it is named.
        """
        clip = self._clips[index]
        number, place = divmod(frame, self._chunk_frames)
        try:
            return self._chunk(clip, number).frame(place)
        except ValueError as error:
            raise self._broken(clip, number, error) from error

    def _chunk(self, clip: Clip, number: int) -> Chunk:
        """One record of a clip, checked to be what the index says."""
        try:
            chunk = parse_record(self._opened(clip.shard)[clip.record + number])
            check_chunk(chunk, clip, number * self._chunk_frames, self._chunk_frames)
            return chunk
        # The library raises RuntimeError for what does not fit its own checksums
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise self._broken(clip, number, error) from error

    def _broken(self, clip: Clip, number: int, error: Exception) -> UserError:
        return UserError(
            f"{self._shards[clip.shard]}: record {clip.record + number} of clip {clip.name} is "
            f"broken ({error}), expected what was packed: {MEND}"
        )


def is_packed(root: str | Path) -> bool:
    """Whether a folder was finished by scripts/prepare_data.py."""
    return (Path(root) / INDEX).is_file()


def open_packed(
    root: str | Path,
    *,
    key: str = "config.data.root",
    include: str = "",
    exclude: str = "",
    faults: Faults | None = None,
) -> PackedSource:
    """Open what scripts/prepare_data.py wrote: the same clips, in the same order, as packed.

    One file is read, and of every shard its size is looked at; records are checked when they are
    read.

    Args:
        root: local folder with index.json.
        key: that names it, for messages.
        include, exclude: see `lists.choose`.
        faults: what to do about the clips of a shard that is missing or cut off.

    Raises:
        UserError: no such folder; the index is broken; a shard is missing or has another size.
    """
    folder, faults = Path(root), faults or Faults()
    if not root:
        raise UserError(f"{key} is empty: give --{key}=DIR, {WANTED}")
    if not is_packed(folder):
        hint = "is not packed to its end: run it again with the same --output"
        found = hint if (folder / UNFINISHED).is_dir() else f"has no {INDEX}"
        raise UserError(f"{key}={root} {found}; {WANTED} into a local folder")
    index = read_index(folder / INDEX)
    paths = [folder / shard.file for shard in index.shards]
    with ThreadPoolExecutor(THREADS) as pool:
        errors = list(pool.map(_shard_fault, paths, index.shards))
    chosen = choose([clip.name for clip in index.clips], include, exclude, str(root))
    clips = []
    for clip in (index.clips[i] for i in chosen):
        if error := errors[clip.shard]:
            faults.add(UserError(f"{error} (clip {clip.name})"))
        else:
            clips.append(clip)
    notes = [*index.notes, *faults.notes(len(chosen), str(root))]
    return PackedSource(index.name, paths, clips, index.chunk_frames, notes)


def _shard_fault(path: Path, shard: Shard) -> str:
    """What is wrong with a shard at first sight, or an empty string."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path} is missing ({error.strerror}), {shard.bytes:,} bytes expected: {MEND}"
    if size == shard.bytes:
        return ""
    return f"{path} has {size:,} bytes, expected {shard.bytes:,}: {MEND}"
