"""What a picture says of itself before it is decoded: size, kind, how it is turned.

Read off the first bytes of JPEG and PNG. Frames may also be TIFF, BMP or WebP, whose headers
Pillow reads. A picture that its camera marked as turned (EXIF) is as large as it is after turning.
"""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

from PIL.BmpImagePlugin import BmpImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 64_000_000  # an 8-frame clip of such pictures takes 1.5 GB
JPEG, PNG, TIFF, BMP = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*"), b"BM"
PNG_KINDS = {0: "grey", 2: "RGB", 3: "indexed", 4: "grey with an alpha channel"}
PNG_KINDS[6] = "RGBA, with an alpha channel"
MODES = {"1": "grey", "L": "grey", "I;16": "grey", "I;16B": "grey", "P": "indexed", "RGB": "RGB"}
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
FRAME_KINDS, MASK_KINDS = ("JPEG", "grey", "RGB", "indexed"), ("grey", "indexed")
BITS = (1, 2, 4, 8, 16)  # per sample
ORIENTATION = 0x0112  # EXIF tag


class Unfit(ValueError):
    """A picture that cannot be used. The text goes on from the name of the file."""


class Header(NamedTuple):
    """What a picture says of itself."""

    width: int  # pixels, after turning
    height: int
    kind: str  # JPEG, grey, RGB, indexed, or in words what else it is
    bits: int  # per sample
    turn: int = 1  # EXIF orientation, 1-8, that is still to be applied after decoding


def exif_orientation(exif: bytes) -> int:
    """How a picture is to be turned, 1-8, from its EXIF data; 1 where they do not say.

    By hand, since Pillow takes 20 times as long and warns of every broken entry.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if not exif.startswith(TIFF):
        return 1
    order = "<" if exif.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1  # broken EXIF data are no broken picture
    return 1


def parse_header(data: bytes) -> Header | None:
    """Size and kind from encoded bytes, or None if more bytes are needed to tell.

    A beginning is enough for JPEG and PNG; the other formats need the whole file.

    Raises:
        Unfit: of no known format, or cut short (formats other than JPEG and PNG).
    """
    if data.startswith(JPEG):
        return _jpeg_header(data)
    if data.startswith(PNG):
        return _png_header(data)
    image = open_image(data)
    tags = getattr(image, "tag_v2", {})
    bands, pages = tags.get(277, len(image.getbands())), getattr(image, "n_frames", 1)
    if pages > 1:
        kind = f"{pages} pictures in one file"
    elif image.mode in ALPHA:
        kind = f"{image.mode}, with an alpha channel"
    elif bands not in (1, 3):
        kind = f"{image.mode}, with {bands} bands"
    else:
        kind = MODES.get(image.mode, f"of mode {image.mode}")
    bits = 16 if image.mode.startswith("I;16") else 32 if image.mode in "IF" else 8
    # Pillow turns a TIFF by itself, size included.
    turn = 1 if isinstance(image, TiffImageFile) else exif_orientation(image.info.get("exif", b""))
    width, height = image.size if turn < 5 else image.size[::-1]
    if isinstance(image, TiffImageFile):
        starts, lengths = tags.get(273) or tags.get(324, ()), tags.get(279) or tags.get(325, ())
        end = max((a + b for a, b in zip(starts, lengths, strict=False)), default=0)
    else:
        end = struct.unpack_from("<I", data, 2)[0] if data.startswith(BMP) else 0
    if end > len(data):
        raise Unfit(f"is cut short at {len(data):,} bytes: copy or extract it again")
    return Header(width, height, kind, bits, turn)


def _jpeg_header(data: bytes) -> Header | None:
    """Walk the segments up to the one that starts a frame (SOF)."""
    at, turn = 2, 1
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, bands = struct.unpack_from(">BHHB", data, at + 4)
            kind = "JPEG" if bands in (1, 3) else "CMYK" if bands == 4 else f"{bands} bands"
            if turn >= 5:
                width, height = height, width
            return Header(width, height, kind, bits, turn)
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            turn = exif_orientation(data[at + 4 : at + 2 + length])
        at += 2 + length
    return None


def _png_header(data: bytes) -> Header | None:
    """The first chunk, and EXIF data where they come before the pixels."""
    if len(data) < 26:
        return None
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    kind, pixels = PNG_KINDS.get(colour, "unknown"), data.find(b"IDAT")
    if pixels < 0 and width * height <= MAX_PIXELS:
        return None
    exif, turn = data.find(b"eXIf", 0, max(pixels, 0)), 1
    if exif > 0:
        turn = exif_orientation(data[exif + 4 : pixels])
    if turn >= 5:
        width, height = height, width
    return Header(width, height, kind, bits, turn)


def open_image(data: bytes):
    """A Pillow image, nothing decoded.

    Its classes are called by name, since Image.open warns of large pictures in its own words,
    and tries formats that nobody wants.
    """
    if data.startswith(PNG):
        opener = PngImageFile
    elif data.startswith((*TIFF, b"II+\0", b"MM\0+")):
        opener = TiffImageFile
    elif data.startswith(BMP):
        opener = BmpImageFile
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        opener = WebPImageFile
    else:
        raise Unfit("is neither JPEG nor PNG, TIFF, BMP or WebP: save it as one of these")
    return guarded(lambda: opener(io.BytesIO(data)))


def guarded(call: Callable):
    try:
        return call()
    except Exception as error:  # Pillow lets nearly anything escape on broken bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def frame_fault(header: Header) -> str:
    """Why a picture cannot be a frame, to go on from the name of its file; or nothing."""
    if fault := too_large(header):
        return fault
    if header.kind not in FRAME_KINDS:
        return f"is {header.kind}, expected grey or RGB: save it as RGB, one picture a file"
    if header.bits not in BITS:
        return f"has {header.bits} bits a sample, expected 8 or 16: save it with 8"
    return ""


def mask_fault(header: Header) -> str:
    """Why a picture cannot be a mask, to go on from the name of its file; or nothing."""
    if fault := too_large(header):
        return fault
    if header.kind in MASK_KINDS and header.bits in BITS:
        return ""
    return (
        f"is {header.kind} with {header.bits} bits, expected an indexed PNG with one index per "
        "object: save label indices as a palette image (Pillow mode P), or grey with 16 bits"
    )


def too_large(header: Header) -> str:
    """Why a picture cannot be decoded for its size, in the same form; or nothing."""
    if header.width * header.height <= MAX_PIXELS:
        return ""
    return (
        f"is {header.width} x {header.height}, more than {MAX_PIXELS // 10**6} million pixels: "
        "shrink it (masks with nearest neighbour), or cut it into pieces"
    )
