"""Encoded bytes to arrays.

JPEG goes through simplejpeg: libjpeg-turbo as in Pillow, with the same pixels to the last bit, and
faster than Pillow and OpenCV (which also turns pictures by their EXIF tag, as no mask is turned).
Masks go through Pillow: OpenCV expands a palette, and index 1 reads as 38.
"""

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

JPEG = b"\xff\xd8"


def decode_frame(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """JPEG or PNG bytes to RGB.

    Raises:
        ValueError, OSError: the bytes are no whole picture.
    """
    if data.startswith(JPEG):
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def decode_labels(data: bytes) -> UInt8[np.ndarray, "h w"]:
    """Bytes of an indexed (or 8-bit grey) PNG to its indices.

    Raises:
        OSError: the bytes are no whole picture.
        ValueError: it holds colours, not indices.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"a mask image of mode {image.mode}, expected an indexed PNG")
        return np.array(image)
