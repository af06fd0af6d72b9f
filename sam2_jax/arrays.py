"""Trees of arrays in folders of their own, as Orbax keeps them."""

import pathlib

import jax
import orbax.checkpoint as ocp
from etils import epath

from sam2_jax import integrity, lora, partition
from sam2_jax.rules import Tree, paths_of
from sam2_jax.types import UserError, listed

MARK = "_METADATA"  # marks such a folder


def shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Slash path -> shape of every array that Orbax keeps in `folder`. Reads no array.

    Raises `UserError` where that is damaged.
    """
    # The handler itself: a Checkpointer would look for, and miss, a step's metadata here.
    with integrity.reading(folder):
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder.resolve())).tree
        leaves = jax.tree.leaves(tree)
        found = {path: tuple(leaf.shape) for path, leaf in zip(paths_of(tree), leaves, strict=True)}
    integrity.check_names(folder, found)
    return found


def differences(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """In words: arrays that are missing, unexpected or of another shape."""
    missing = [f"'{path}' is missing" for path in wanted if path not in found]
    extra = [f"'{path}' is not expected" for path in found if path not in wanted]
    misshapen = [
        f"'{path}' is {list(found[path])}, expected {list(wanted[path])}"
        for path in wanted
        if path in found and found[path] != wanted[path]
    ]
    return misshapen + missing + extra


def check(folder: pathlib.Path, like: Tree, of: str) -> None:
    """Raises `UserError` unless the arrays in `folder` have the paths and shapes of `like`.

    `of` says what `like` is of, for the message.
    """
    if not (folder / MARK).exists():
        raise integrity.damaged(folder, "it is missing or holds no arrays")
    wanted = {
        path: tuple(leaf.shape)
        for path, leaf in zip(paths_of(like), jax.tree.leaves(like), strict=True)
    }
    if differing := differences(shapes(folder), wanted):
        raise UserError(
            f"{folder} does not fit {of}: {listed(differing)}; take the settings it was saved "
            "with, or another folder"
        )


def read(folder: pathlib.Path, like: Tree) -> Tree:
    """The tree in `folder`, which is as `like` says, laid out so.

    Raises `UserError` where it cannot be read, or is not what was saved (see integrity.py).
    """
    with integrity.reading(folder), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.resolve(), like)
    integrity.verify(folder, tree)
    return tree


def read_part(folder: pathlib.Path, like: Tree) -> Tree:
    """The parameters that `folder` has, those of all adapters among them, of those in `like`."""
    there = shapes(folder)
    like, _ = partition.split(like, lambda path: path in there or lora.is_lora(path))
    check(folder, like, "the model it is said to belong to")
    return read(folder, like)
