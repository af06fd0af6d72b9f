"""Figures as JSON and as tables."""

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from sam2_jax.config import Parser
from sam2_jax.types import UserError

MIB = 2**20


def add_json(parser: Parser) -> None:
    """The flag --json of all that measure; a file that cannot be written is told at once."""
    parser.add_argument("--json", type=_writable, help="file for the figures")


def _writable(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        # Rights alone do not tell: root has them all, and a file system may be mounted read-only
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"--json={path} cannot be written ({error.strerror or error}): give a file in a folder "
        "that exists and can be written to"
    )


def ratio(ours: float | int | None, theirs: float | int | None) -> float | None:
    """Ours over the reference's; None where one of them is not known."""
    return ours / theirs if ours is not None and theirs else None


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints aligned columns, numbers with four digits; a dash for what is not known."""
    cells = [list(head), *([_cell(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = (
            x.ljust(w) if i == 0 else x.rjust(w)
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *rest]), flush=True)


def _cell(x: Any) -> str:
    if x is None:
        return "-"
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def write(path: pathlib.Path | None, figures: dict[str, Any]) -> None:
    """Writes the figures as JSON, if a file was given."""
    if path is None:
        return
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise _unwritable(path, error) from error
