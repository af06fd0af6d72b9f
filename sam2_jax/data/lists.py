"""Text files that name the clips to take or to leave out, one a line."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sam2_jax.types import UserError, listed

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


def choose(names: Sequence[str], include: str, exclude: str, where: str) -> list[int]:
    """Which clips are taken, in the order they have.

    A line is the name of a clip, with or without the ending of its file, as in the reference
    (facebookresearch/sam2@2b90b9f training/dataset/vos_raw_dataset.py). A name in `exclude` that
    there is no clip of is nothing to worry about: lists are made for whole sets.

    Args:
        names: of all clips.
        include: path of a list; empty: all clips.
        exclude: path of a list of those to leave out; empty: none.
        where: what the clips come from, for messages.

    Returns:
        Indices into `names`.

    Raises:
        UserError: a list cannot be read, or names no clip, or one that is not there; or nothing
            is left.
    """
    taken, known = range(len(names)), set(names)
    if include:
        wanted = _read(include, known)
        if missing := [name for name in wanted if name not in known]:
            raise UserError(
                f"{include} names clips that {where} does not have ({listed(missing)}): take them "
                "out of the list, or add them"
            )
        taken = [i for i in taken if names[i] in wanted]
    if exclude:
        unwanted = _read(exclude, known)
        taken = [i for i in taken if names[i] not in unwanted]
        if not taken:
            raise UserError(f"{exclude} leaves no clip of {where}: shorten it")
    return list(taken)


def _stem(name: str) -> str:
    """A clip's name without the ending of a picture."""
    path = Path(name)
    return str(path.with_suffix("")) if path.suffix.lower() in PICTURES else name


def _read(path: str, names: set[str]) -> dict[str, None]:
    """Names of a list, in order."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()  # Windows puts a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), expected a text file with the name of a clip a line"
        ) from error
    # Of pictures whose name has its ending; two of one name but for that are told apart by it.
    stems = Counter(_stem(name) for name in names)
    whole = {_stem(name): name for name in names if stems[_stem(name)] == 1}
    found = {}
    for line in filter(None, map(str.strip, lines)):
        stem = str(Path(line).with_suffix("")) if line not in names and Path(line).name else line
        if stem not in names:
            stem = whole.get(line, line)
        found[stem] = None
    if not found:
        raise UserError(f"{path} is empty, expected the name of a clip a line: fill or drop it")
    return found
