"""The JSON files of SA-V: run lengths of every object on every annotated frame.

`{"masklet": [[rle, ...], ...], "video_height": 848.0, "video_width": 480.0, ...}`, a row for every
annotated frame and in it an entry for every object, None where nobody annotated it. Older files
call the field `masks` or are only the list, as the reference knows them
(facebookresearch/sam2@2b90b9f training/dataset/vos_segment_loader.py, JSONSegmentLoader).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from sam2_jax.data.rle import decode_rle, rle_area
from sam2_jax.data.scan import changed, load_json
from sam2_jax.types import UserError

FPS = 24  # of the videos
KEPT_FILES = 4  # parsed, some megabytes each; objects and masks of a clip are asked for in turn
MEND = "download it again, or leave the clip out by config.data.exclude"


class Masklets(NamedTuple):
    """One file. Annotated is frame `row * every` of the video."""

    path: Path
    height: int  # pixels
    width: int
    every: int
    rows: list[list[Any] | None]


def read_masklets(path: Path, ann_every: int) -> Masklets:
    """Parse a file; the masks are not looked at.

    Args:
        path: the file.
        ann_every: annotated is every so manieth frame, unless the file has a field `fps`: the
            annotated frames of 24 in a second.

    Raises:
        UserError: it is no such file, or does not say of which size its masks are.
    """
    return _parse(path, ann_every, changed(path))


@functools.lru_cache(maxsize=KEPT_FILES)
def _parse(path: Path, ann_every: int, time: int) -> Masklets:
    del time  # part of the key: a file may be mended while this process runs
    data = load_json(path)
    fields = data if isinstance(data, Mapping) else {"masklet": data}
    rows = fields.get("masklet", fields.get("masks"))
    if not isinstance(rows, list) or not all(row is None or isinstance(row, list) for row in rows):
        raise UserError(
            f"{path} has no list of frames called masklet, expected the annotations of SA-V: {MEND}"
        )
    first = next((rle for row in rows for rle in row or [] if isinstance(rle, Mapping)), {})
    size: Any = [fields.get("video_height"), fields.get("video_width")]
    if None in size:
        size = first.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(_is_whole(n) for n in size):
        raise UserError(
            f"{path} has video_height and video_width {size}, expected two numbers: {MEND}"
        )
    if "fps" in fields:
        fps: Any = fields["fps"]
        fps = fps[0] if isinstance(fps, list) and fps else fps
        if not _is_whole(fps) or FPS % int(fps):
            raise UserError(f"{path} has fps {fps}, expected a divisor of {FPS}: {MEND}")
        ann_every = FPS // int(fps)
    return Masklets(path, int(size[0]), int(size[1]), ann_every, rows)


def _is_whole(number: object) -> bool:
    return isinstance(number, int | float) and number >= 1 and float(number).is_integer()


def complete_rows(masklets: Masklets) -> list[int]:
    """Rows in which no object lacks its mask.

    The others are left out, as `rm_unannotated` does in the reference (vos_raw_dataset.py,
    JSONRawDataset): a missing mask does not mean that the object is absent.
    """
    return [i for i, row in enumerate(masklets.rows) if row is not None and None not in row]


def visible_objects(masklets: Masklets, row: int) -> list[int]:
    """Ids of the objects with a pixel, from 1 in the order of the file, without decoding.

    Raises:
        UserError: a mask of the row is broken.
    """
    size = masklets.height, masklets.width
    entries = masklets.rows[row] or []
    return [k for k, rle in enumerate(entries, 1) if rle_area(rle, *size, _where(masklets, row, k))]


def object_mask(masklets: Masklets, row: int, k: int) -> Bool[np.ndarray, "h w"]:
    """Mask of one object; empty where the row has no such object, as in the reference.

    Raises:
        UserError: it is broken.
    """
    size = masklets.height, masklets.width
    entries = masklets.rows[row] or [] if row < len(masklets.rows) else []
    if k > len(entries):
        return np.zeros(size, bool)
    return decode_rle(entries[k - 1], *size, _where(masklets, row, k))


def _where(masklets: Masklets, row: int, k: int) -> str:
    return f"{masklets.path}: object {k} of annotated frame {row}"
