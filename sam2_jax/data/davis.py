"""The layout of DAVIS 2016 and 2017: folders by resolution, and lists of the clips of a split."""

from collections.abc import Iterable

from sam2_jax.data.files import AnyPath, is_folder, unreadable
from sam2_jax.types import UserError

RESOLUTIONS = ("480p", "Full-Resolution", "1080p")  # the first that is there, if none is named
LISTS = ("2017", "2016", "480p", "1080p")  # folders below ImageSets, the first that has the list


def clip_folders(root: AnyPath, resolution: str, key: str) -> tuple[AnyPath, AnyPath, bool]:
    """Where the clips of frames and of masks lie, and whether the layout is that of DAVIS.

    Args:
        root: the folder with JPEGImages and Annotations.
        resolution: folder below them; empty for the first that is there, or for flat folders.
        key: how the user named the root, for messages.

    Raises:
        UserError: there is no such resolution.
    """
    images, annotations = root / "JPEGImages", root / "Annotations"
    if resolution and not is_folder(images / resolution):
        there = [name for name in RESOLUTIONS if is_folder(images / name)]
        raise UserError(
            f"{key}={root} has no JPEGImages/{resolution}, found "
            f"{', '.join(there) or 'no resolutions at all'}: set the resolution to one of these, "
            "or leave it empty"
        )
    for name in (resolution,) if resolution else RESOLUTIONS:
        if is_folder(images / name):
            return images / name, annotations / name, True
    return images, annotations, False


def listed_clips(root: AnyPath, split: str, key: str) -> tuple[list[str], AnyPath]:
    """Names of the clips of a split, sorted, and the list that they come from.

    A line is the name of a clip, or, as in DAVIS 2016, the paths of a frame and its mask
    (`/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png`).

    Raises:
        UserError: the list is missing, cannot be read, is empty, or has lines of another kind.
    """
    paths = [root / "ImageSets" / name / f"{split}.txt" for name in LISTS]
    try:
        path = next((path for path in paths if path.is_file()), None)
    except OSError as error:
        raise unreadable(root / "ImageSets", error) from error
    if path is None:
        raise UserError(
            f"{paths[0]} is missing, though {key}={root} has the DAVIS layout: expected one clip "
            "name a line; take it from the DAVIS archive or write it"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows puts a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of clips ({error}): mend it") from error
    names = _names((line for line in lines if line.strip()), path)
    if not names:
        raise UserError(f"{path} names no clip, expected one a line: fill it (from {key}={root})")
    return sorted(names), path


def _names(lines: Iterable[str], path: AnyPath) -> set[str]:
    names = set()
    for line in lines:
        parts = line.split()[0].strip("/").split("/")
        name = parts[0] if len(parts) == 1 else parts[-2]
        if name in ("", ".", "..") or "\\" in name:
            raise UserError(f"{path} has the line {line!r}, expected the name of a clip: mend it")
        names.add(name)
    return names
