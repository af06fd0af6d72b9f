"""Is an image file whole, and of which size and kind? Read off its first and last bytes.

Every listed file is looked at before training starts, so that a broken one is named at once and
not after hours; decoding them all would take a hundred times as long. Only a file with something
else at its end is decoded: pictures of many phones go on after the end marker.
"""

import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from sam2_jax.data.decode import decode_frame
from sam2_jax.types import UserError

THREADS = 16  # waits for disks and network file systems, not for the processor
SHOW_PROGRESS = 2000  # files, a second or two
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_KINDS = {0: "grey", 2: "RGB", 3: "indexed", 4: "grey with alpha", 6: "RGBA"}
MEND = "copy or extract it again"


class Header(NamedTuple):
    """What a file says of itself. `kind`: JPEG, or the colour type of a PNG."""

    width: int
    height: int
    kind: str
    bits: int  # per sample


def _jpeg_header(head: bytes) -> Header | None:
    """Walk the segments up to the one that starts a frame (SOF); None if it is not in `head`."""
    at = 2
    while at + 9 < len(head):
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack(">BHH", head[at + 4 : at + 9])
            return Header(width, height, "JPEG", bits)
        else:
            at += 2 + struct.unpack(">H", head[at + 2 : at + 4])[0]
    return None


def _is_whole(data: bytes, end: bytes) -> bool:
    """Can the picture be decoded up to its end marker, whatever comes after that?"""
    try:
        decode_frame(data)
    except (OSError, SyntaxError, ValueError):
        return False
    return end in data  # Pillow decodes a PNG that lacks its last bytes


def read_header(path: Path) -> Header:
    """Size and kind of a JPEG or PNG file.

    Raises:
        UserError: it is missing, neither of the two, or cut short.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(0, 2)
            length = file.tell()
            file.seek(max(0, length - 256))
            tail = file.read().rstrip(b"\0\r\n ")
            if head.startswith(JPEG_START):
                file.seek(0)  # long EXIF data or a colour profile come before the size
                header, end = _jpeg_header(head) or _jpeg_header(file.read()), JPEG_END
            elif head.startswith(PNG_START):
                header, end = None, PNG_END
                if len(head) >= 26:
                    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
                    header = Header(width, height, PNG_KINDS.get(colour, "unknown"), bits)
            elif not head:
                raise UserError(f"{path} is empty (0 bytes), expected an image: {MEND}")
            else:
                raise UserError(f"{path} is neither JPEG nor PNG: {MEND}, or remove its clip")
            whole = tail.endswith(end)
            if header and not whole:
                file.seek(0)
                whole = _is_whole(file.read(), end)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {MEND}") from error
    if header is None or not whole:
        raise UserError(f"{path} is cut short at {length:,} bytes, its end is missing: {MEND}")
    return header


def read_headers(paths: Sequence[Path]) -> list[Header]:
    """Headers of many files, in order; a progress bar on stderr if they are very many.

    Raises:
        UserError: of the first file, in order, that is broken.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        headers: Iterable[Header] = pool.map(read_header, paths)
        if len(paths) > SHOW_PROGRESS:
            headers = tqdm(headers, "checking files", len(paths), leave=False, unit="file")
        try:
            return list(headers)
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


def check_mask(path: Path, header: Header) -> None:
    """Raise a UserError unless a mask image can hold label indices."""
    if header.kind == "indexed":
        return
    if header.kind == "grey" and header.bits <= 8:
        found = "a grey image, in which white would be object 255"
        mend = (
            "for one object save it with Pillow: mask = Image.fromarray((array > 127)"
            ".astype('uint8')); mask.putpalette([0, 0, 0, 255, 255, 255]); mask.save(path)"
        )
    else:
        found = f"{header.kind} with {header.bits} bits"
        mend = "save label indices as a palette image (Pillow mode P)"
    raise UserError(f"{path} is {found}, expected an indexed PNG with one index per object: {mend}")
