"""Encoded bytes to arrays.

JPEG goes through simplejpeg: libjpeg-turbo as in Pillow, with the same pixels to the last bit, and
faster than Pillow and OpenCV. Everything else goes through Pillow, masks above all: OpenCV expands
a palette, and index 1 reads as 38. Frames may also be TIFF, BMP or WebP; masks are always PNG.

16 bits become 8 by dropping the lower byte, as Pillow does for colours. Pictures that use only a
part of the 16 bits, as 12-bit microscopes write them, come out dark: rescale those beforehand.
Pictures that their camera marked as turned (EXIF; in PNG only before the pixels) are turned.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Bool, UInt8, UInt16

from sam2_jax.data.headers import (
    JPEG,
    PNG,
    Header,
    Unfit,
    frame_fault,
    guarded,
    mask_fault,
    open_image,
    parse_header,
)


def _checked(data: bytes, fault_of: Callable[[Header], str]) -> Header:
    header = parse_header(data)
    if header is None:
        raise ValueError("its end is missing")
    if fault := fault_of(header):
        raise Unfit(fault)
    return header


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Apply an EXIF orientation: 5 to 8 swap the axes, then rows or columns are mirrored."""
    if turn == 1:
        return pixels
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = turn in (3, 4, 7, 8), turn in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def decode_frame(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """JPEG, PNG, TIFF, BMP or WebP bytes, grey, indexed or RGB, 8 or 16 bits, to RGB 0-255.

    Raises:
        Unfit: another kind (alpha channel, CMYK, bands), or more than MAX_PIXELS.
        ValueError, OSError: the bytes are no whole picture.
    """
    header = _checked(data, frame_fault)
    if data.startswith(JPEG):
        return _turned(simplejpeg.decode_jpeg(data, colorspace="RGB"), header.turn)
    with open_image(data) as image:
        image.info.pop("transparency", None)  # a transparent colour is a colour like others
        if header.bits == 16 and header.kind == "grey":
            grey = (guarded(lambda: np.array(image)) >> 8).astype(np.uint8)
            return _turned(np.repeat(grey[..., None], 3, -1), header.turn)
        return _turned(guarded(lambda: np.array(image.convert("RGB"))), header.turn)


def _decode_mask(data: bytes) -> tuple[np.ndarray, Header]:
    """Values as stored, and the header."""
    if not data.startswith(PNG):
        raise Unfit("is no PNG, expected a PNG since labels must keep their values: save it as one")
    header = _checked(data, mask_fault)
    with open_image(data) as image:
        values = guarded(lambda: np.array(image))
    if header.kind == "grey" and 1 < header.bits < 8:
        values = values // (255 // (2**header.bits - 1))  # Pillow spreads them over 0-255
    return _turned(values, header.turn), header


def decode_labels(data: bytes) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]:
    """Bytes of an indexed or grey PNG to the object ids of its pixels, 0 for background.

    Values are ids (up to 65,535 with 16 bits). Only in grey images of 8 bits white, 255, is an
    exception: an image of black and white is one object, of id 1, as in DAVIS 2016.

    Raises:
        Unfit: it holds colours, or white beside other grey values.
        ValueError, OSError: the bytes are no whole picture.
    """
    labels, header = _decode_mask(data)
    if header.kind == "grey" and header.bits == 8 and labels.max(initial=0) == 255:
        if others := set(np.unique(labels).tolist()) - {0, 255}:
            # Not white as object 255: on frames where it is alone it would be object 1.
            raise Unfit(
                f"is a grey mask with white (255) beside {len(others)} other values such as "
                f"{max(others)}, expected black and white for one object: export it without "
                "smoothing, or save label indices as a palette image (Pillow mode P)"
            )
        return (labels == 255).astype(np.uint8)
    return labels.astype(np.uint16 if header.bits == 16 else np.uint8, copy=False)


def decode_binary(data: bytes) -> Bool[np.ndarray, "h w"]:
    """Bytes of a PNG of one object, indexed or grey, to its mask: all that is not 0.

    Raises:
        Unfit: it holds colours.
        ValueError, OSError: the bytes are no whole picture.
    """
    return _decode_mask(data)[0] > 0


def visible_ids(
    labels: UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"],
) -> tuple[int, ...]:
    """Ids other than background in a label map [h, w], ascending."""
    bins = np.iinfo(labels.dtype).max + 1
    counts = cv2.calcHist([labels], [0], None, [bins], [0, bins])  # 5 times as fast as numpy's
    return tuple((np.flatnonzero(counts[1:]) + 1).tolist())


def masks_of(labels: np.ndarray, objects: Sequence[int]) -> Bool[np.ndarray, "o h w"]:
    """Masks of some objects in a label map [h, w]; empty where an object is absent."""
    masks = np.empty((len(objects), *labels.shape), bool)
    for mask, label in zip(masks, objects, strict=True):
        np.equal(labels, label, out=mask)
    return masks
