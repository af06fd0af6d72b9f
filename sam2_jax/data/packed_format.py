"""Clips packed into few large files: what is in them. Written by `packing`, read by `packed`.

    DIR/index.json                              all clips; nothing else is read to open them
    DIR/clips-00000-of-00016.array_record ...   one record for every `chunk_frames` frames of a clip

A record is: the length of a header and its CRC-32 (two little-endian 32-bit numbers), the header
(JSON), and the frames one after the other, each a whole JPEG, PNG or other picture.

    {"clip": "bear", "first": 16, "size": [480, 854], name, number of its first frame, height, width
     "frames": [[51234, 2774134521], ...],            bytes and CRC-32 of each frame
     "masks": [{"1": "V9d0...", "7": "0:b..."}, ...]} counts of COCO's RLE by object, of each frame

The index is one JSON object: `format`, `version`, `name`, `notes`, `made_of` (the settings with
which it was packed), `broken` (clips left out, and why), `chunk_frames`, `shards` (file name,
bytes, number of records, CRC-32), `clips` and `crc32`, the CRC-32 of `json.dumps(clips)`. A clip is
its name, number of frames, height, width, shard, record of its first frames (the others follow) and
visible objects: "1-3:0-84 7:0-10,20-84" says that 1, 2 and 3 are seen on frames 0 to 84, and 7 on
0 to 10 and 20 to 84.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sam2_jax.data.sources import Video
from sam2_jax.types import UserError

FORMAT, VERSION = "sam2_jax packed clips", 1
INDEX = "index.json"
UNFINISHED = ".packing"  # folder inside the root while it is written
MEND = "copy it again from where it was packed, or pack into a new folder"
WANTED = f"expected a folder with {INDEX}, as scripts/prepare_data.py writes it"
_PREFIX = struct.Struct("<II")
_RANGES = r"\d+(-\d+)?(,\d+(-\d+)?)*"
_VISIBLE = re.compile(rf"({_RANGES}:{_RANGES}( {_RANGES}:{_RANGES})*)?")


class Shard(NamedTuple):
    """One file of records."""

    file: str
    bytes: int
    records: int
    crc32: int  # of the whole file


class Clip(NamedTuple):
    """One clip of the index."""

    name: str
    num_frames: int
    height: int
    width: int
    shard: int
    record: int
    visible: str

    def records(self, chunk_frames: int) -> int:
        """How many records it has."""
        return -(-self.num_frames // chunk_frames)


class Chunk(NamedTuple):
    """One record, taken apart."""

    clip: str
    first: int
    size: tuple[int, int]  # height, width
    masks: list[dict[str, str]]  # of each frame: counts by id
    crcs: list[int]
    frames: list[memoryview]

    def frame(self, index: int) -> bytes:
        """The encoded picture number `index` of this chunk. Raises ValueError if it is broken."""
        data = bytes(self.frames[index])
        if zlib.crc32(data) != self.crcs[index]:
            raise ValueError(f"the checksum of frame {self.first + index} is wrong")
        return data


def build_record(
    video: Video, first: int, frames: Sequence[bytes], masks: Sequence[dict[int, str]]
) -> bytes:
    """Encoded frames of a clip from `first` on, and RLE counts of their objects, as a record."""
    header = {
        "clip": video.name,
        "first": first,
        "size": [video.height, video.width],
        "frames": [[len(data), zlib.crc32(data)] for data in frames],
        "masks": masks,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([_PREFIX.pack(len(text), zlib.crc32(text)), text, *frames])


def parse_record(data: bytes) -> Chunk:
    """The reverse of `build_record`.

    Raises:
        ValueError: it is no record, or its header is broken.
    """
    if len(data) < _PREFIX.size:
        raise ValueError("it is too short")
    length, crc = _PREFIX.unpack_from(data)
    end = _PREFIX.size + length
    text = data[_PREFIX.size : end]
    if zlib.crc32(text) != crc:
        raise ValueError("the checksum of its header is wrong")
    header = json.loads(text)
    sizes = [size for size, _ in header["frames"]]
    if end + sum(sizes) != len(data) or len(sizes) != len(header["masks"]):
        raise ValueError("its header does not fit its length")
    frames = []
    for size in sizes:
        frames.append(memoryview(data)[end : end + size])
        end += size
    crcs = [crc for _, crc in header["frames"]]
    height, width = header["size"]
    return Chunk(header["clip"], header["first"], (height, width), header["masks"], crcs, frames)


def visible_text(visible: Sequence[Sequence[int]]) -> str:
    """Ids seen on every frame as the index has them."""
    frames: dict[int, list[int]] = {}
    for t, ids in enumerate(visible):
        for k in ids:
            frames.setdefault(k, []).append(t)
    together: dict[str, list[int]] = {}
    for k in sorted(frames):
        together.setdefault(_ranges(frames[k]), []).append(k)
    return " ".join(f"{_ranges(ids)}:{seen}" for seen, ids in together.items())


def visible_on(text: str, frame: int) -> tuple[int, ...]:
    """Ids that a text of `visible_text` names for a frame, ascending."""
    found: list[int] = []
    for part in text.split():
        ids, frames = part.split(":")
        if any(frame in some for some in _parse_ranges(frames)):
            found.extend(k for some in _parse_ranges(ids) for k in some)
    return tuple(sorted(found))


def _ranges(numbers: Iterable[int]) -> str:
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ends = [(run[0][1], run[-1][1]) for run in runs]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


def _parse_ranges(text: str) -> list[range]:
    ends = [part.partition("-") for part in text.split(",")]
    return [range(int(a), int(b or a) + 1) for a, _, b in ends]


def check_chunk(chunk: Chunk, clip: Clip, first: int, chunk_frames: int) -> None:
    """Raises ValueError unless a record holds the frames of a clip from `first` on."""
    count = min(chunk_frames, clip.num_frames - first)
    found = (chunk.clip, chunk.first, len(chunk.frames), chunk.size)
    expected = (clip.name, first, count, (clip.height, clip.width))
    if found != expected:
        raise ValueError(
            "it is {} frame {} on, {} frames of {}, not {} frame {} on, {} frames of {}".format(
                *found, *expected
            )
        )


class Index(NamedTuple):
    """What an index file says."""

    name: str
    notes: list[str]
    made_of: dict[str, Any]
    broken: list[list[str]]
    chunk_frames: int
    shards: list[Shard]
    clips: list[Clip]


def index_text(index: Index) -> str:
    """Contents of an index file."""
    checksum = zlib.crc32(json.dumps(index.clips).encode())
    return json.dumps({"format": FORMAT, "version": VERSION, **index._asdict(), "crc32": checksum})


def read_index(path: Path) -> Index:
    """Read an index file.

    Raises:
        UserError: it cannot be read, is broken, of another kind or of a later version.
    """
    try:
        about = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {MEND}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON or cut off ({error}): {MEND}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f'{path} is no index of packed clips ("format": "{FORMAT}"): {WANTED}')
    if about.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {about.get('version')} of the format, expected {VERSION}: pack "
            "the clips again, or use the sam2_jax that packed them"
        )
    try:
        fault = "" if zlib.crc32(json.dumps(about["clips"]).encode()) == about["crc32"] else "crc32"
        shards = [Shard(*row) for row in about["shards"]]
        clips = [Clip(*row) for row in about["clips"]]
        per_record = about["chunk_frames"]
        if not all(Path(shard.file).name == shard.file != ".." for shard in shards):
            fault = "a shard with a path"  # which could lead out of the folder
        for clip in clips:
            last = shards[clip.shard].records - clip.records(per_record)
            if not 0 <= clip.record <= last or clip.shard < 0 or clip.num_frames < 1:
                fault = fault or f"the place of {clip.name}"
            if not _VISIBLE.fullmatch(clip.visible):
                fault = fault or f"the objects of {clip.name}"
        name, notes = about["name"], about["notes"]
        made_of, broken = about["made_of"], about["broken"]
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} lacks or misplaces something ({error!r}): {MEND}") from error
    if fault:
        raise UserError(f"{path} is broken, {fault} is not what was written: {MEND}")
    return Index(name, notes, made_of, broken, per_record, shards, clips)
