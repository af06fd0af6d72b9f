"""Masks as run lengths in COCO's format, of SA-V, SA-1B and COCO itself.

Runs alternate between background and object, down the columns. `counts` is the list of their
lengths or, compressed, a string: numbers of five bits a character, from the fourth on as the
difference to the last but one (pycocotools, maskApi.c). They are decoded here and not by
pycocotools: it trusts its input, returns memory that was never written for counts that do not fill
the picture, reads past the end of some strings, and takes several times as long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int64
from pycocotools import mask as coco_mask

from sam2_jax.types import UserError

MEND = "download or export it again"
FIRST, LAST = 48, 111  # characters of compressed counts; less 48 they have six bits
MORE, SIGN, BITS = 0x20, 0x10, 5  # another character follows; the number is negative
LONGEST = 7  # characters of one number: 35 bits, and pycocotools counts in 32


def decode_rle(rle: object, height: int, width: int, where: str) -> Bool[np.ndarray, "h w"]:
    """One mask.

    Args:
        rle: `{"size": [height, width], "counts": ...}`; counts compressed (str or bytes) or a list.
        height: of the picture that it must fit, pixels.
        width: likewise.
        where: what it is the mask of, and in which file; begins the message of an error.

    Raises:
        UserError: no such mapping, another size, or counts that do not add up to the size.
    """
    runs = rle_runs(rle, height, width, where)
    values = np.zeros(runs.size, np.uint8)
    values[1::2] = 1
    columns = np.repeat(values, runs).reshape(width, height)
    return cv2.transpose(columns).view(bool)  # several times as fast as numpy's copy of columns.T


def rle_area(rle: object, height: int, width: int, where: str) -> int:
    """Pixels of the object, without decoding. Arguments and errors: see `decode_rle`."""
    return int(rle_runs(rle, height, width, where)[1::2].sum())


def encode_rle(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """`{"size": [height, width], "counts": str}`, compressed, as JSON can hold it."""
    rle: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))  # its stub says str for bytes
    return {"size": [int(side) for side in mask.shape], "counts": rle["counts"].decode()}


def rle_runs(rle: object, height: int, width: int, where: str) -> Int64[np.ndarray, " n"]:
    """Lengths of the runs, background first. Arguments and errors: see `decode_rle`."""
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        found = sorted(map(str, rle)) if isinstance(rle, Mapping) else type(rle).__name__
        raise UserError(f"{where} is {found}, expected run lengths with size and counts: {MEND}")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise UserError(
            f"{where} has run lengths for size {size}, expected [height, width] = "
            f"{[height, width]}: {MEND}, or use the pictures that it was made for"
        )
    if isinstance(counts, str | bytes):
        runs = _from_text(counts.encode() if isinstance(counts, str) else counts)
    else:
        runs = _from_list(counts)
    if runs is None:
        raise UserError(f"{where} has counts that are no run lengths of COCO's format: {MEND}")
    if (total := int(runs.sum())) != height * width:
        raise UserError(
            f"{where} has run lengths of {total:,} pixels in all, expected {height} x {width} = "
            f"{height * width:,}: {MEND}"
        )
    return runs


def _from_list(counts: object) -> Int64[np.ndarray, " n"] | None:
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 2**32 for n in counts):
        return None
    return np.array(counts, np.int64)


def _from_text(text: bytes) -> Int64[np.ndarray, " n"] | None:
    """All numbers of a compressed string at once; None if it is no such string."""
    codes = np.frombuffer(text, np.uint8)
    if not codes.size or codes.min() < FIRST or codes.max() > LAST:
        return None
    codes = codes.astype(np.int64) - FIRST
    ends = np.flatnonzero(codes & MORE == 0)
    if not ends.size or ends[-1] != codes.size - 1:
        return None  # a number is cut off
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        return None
    place = np.arange(codes.size) - np.repeat(starts, lengths)  # lowest bits come first
    runs = np.add.reduceat((codes & (MORE - 1)) << (BITS * place), starts)
    runs -= np.where(codes[ends] & SIGN, 1 << (BITS * lengths), 0)
    runs[2::2] = np.cumsum(runs[2::2])
    runs[1::2] = np.cumsum(runs[1::2])
    return runs if runs.min() >= 0 else None
