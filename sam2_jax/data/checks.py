"""Are the files of a clip whole, of one size and of the right kind? Read off their ends.

Every listed file is looked at before training starts, so that a broken one is named at once and
not after hours; decoding them all would take a hundred times as long. Only a file with something
else at its end is decoded: pictures of many phones go on after the end marker.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.files import AnyPath, Files
from sam2_jax.data.headers import (
    JPEG,
    PNG,
    Header,
    Unfit,
    frame_fault,
    mask_fault,
    parse_header,
    too_large,
)
from sam2_jax.data.sources import THREADS, Faults, Video, bar
from sam2_jax.types import UserError

GROUP = 4096  # files in flight, so that memory does not grow with the data
HEAD, TAIL = 4096, 256  # bytes
ENDS = {JPEG: b"\xff\xd9", PNG: b"IEND\xaeB`\x82"}
MEND = "copy or extract it again"


def read_header(path: AnyPath) -> Header:
    """Size and kind of a picture.

    Raises:
        UserError: it cannot be read, is no picture, is cut short or too large.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            length = file.seek(0, 2)
            if not head:
                raise UserError(f"{path} is empty (0 bytes), expected a picture: {MEND}")
            start = next((magic for magic in ENDS if head.startswith(magic)), None)
            header = parse_header(head) if start else None
            if header is None:  # EXIF data and colour profiles may come before the size
                file.seek(0)
                header = parse_header(file.read())
            if header and too_large(header):
                return header  # whole or not
            if start:
                file.seek(max(0, length - TAIL))
                whole = file.read().rstrip(b"\0\r\n ").endswith(ENDS[start])
                if header and not whole:
                    file.seek(0)
                    whole = _is_whole(file.read(), ENDS[start])
                if not (header and whole):
                    header = None
    except Unfit as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): give read permission, or {MEND}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): {MEND}") from error
    if header is None:
        raise UserError(f"{path} is cut short at {length:,} bytes, its end is missing: {MEND}")
    return header


def _is_whole(data: bytes, end: bytes) -> bool:
    """Can the picture be decoded up to its end marker, whatever comes after that?"""
    try:
        decode_frame(data)
    except Unfit:
        pass  # a mask, or a fault that is told apart from this
    except (OSError, ValueError):
        return False
    return end in data  # Pillow decodes a PNG that lacks its last bytes


def _look(path: AnyPath) -> Header | UserError:
    try:
        return read_header(path)
    except UserError as error:
        return error


def check_files(clips: Sequence[Files], faults: Faults) -> list[tuple[Files, Video]]:
    """Look at every file of some clips; a progress bar on stderr if they are very many.

    Returns:
        The clips without a fault, each with the size of its frames. `faults` got an error for
        each of the others.

    Raises:
        UserError: of the first file, in order, that is broken, unless broken clips are left out.
    """
    total, kept = sum(len(clip.frames) + len(clip.masks) for clip in clips), []
    with ThreadPoolExecutor(THREADS) as pool, bar("checking files", total, "file") as shown:
        for group in _groups(clips):
            paths = [path for clip in group for path in clip.paths()]
            headers = pool.map(_look, paths)
            try:
                for clip in group:
                    found = [next(headers) for _ in clip.paths()]
                    shown.update(len(found))
                    try:
                        kept.append((clip, _video(clip, found)))
                    except UserError as error:
                        faults.add(error)
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise
    return kept


def _groups(clips: Sequence[Files]) -> Iterator[list[Files]]:
    group, files = [], 0
    for clip in clips:
        group.append(clip)
        files += len(clip.frames) + len(clip.masks)
        if files >= GROUP:
            yield group
            group, files = [], 0
    if group:
        yield group


def _video(clip: Files, headers: Sequence[Header | UserError]) -> Video:
    """Name, length and size of a clip whose files all pass."""
    first = headers[0]
    for place, (path, header) in enumerate(zip(clip.paths(), headers, strict=True)):
        if isinstance(header, UserError):
            raise header
        assert isinstance(first, Header)
        fault = frame_fault(header) if place < len(clip.frames) else mask_fault(header)
        if fault:
            raise UserError(f"{path} {fault}")
        if (header.width, header.height) != (first.width, first.height):
            raise UserError(
                f"{path} is {header.width} x {header.height}, but {clip.paths()[0]} is "
                f"{first.width} x {first.height}: expected one size for all frames and masks of a "
                "clip; resize or export it again (masks with nearest neighbour)"
            )
    assert isinstance(first, Header)
    return Video(clip.name, len(clip.frames), first.height, first.width)
