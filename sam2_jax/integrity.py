"""Is a checkpoint what was saved? Sums of every item, and one sentence about what is damaged.

Orbax notices metadata that are cut off or changed, and arrays that are cut off, but restores an
array in whose values a bit has flipped without a word: nothing sums the compressed values. So a
checkpoint gets an item `sums`: of each array a number that its values have on any devices and in
any layout, and one of each JSON item. What is restored is summed again.
"""

import contextlib
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Num, UInt32

from sam2_jax.rules import Tree, paths_of
from sam2_jax.types import Array, UserError, listed

ITEM = "sums"  # of a checkpoint
LONGEST = 300  # characters of another library's message
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


@jax.jit  # traced once per shape
def bit_sum(x: Num[Array, "*n"]) -> UInt32[Array, ""]:
    """A number that notices every change of a single value, and others but for one in 2**32.

    A sum of integers, hence exact in any order and for any sharding. Made to notice accidents, not
    forgeries. Of elements of up to 4 bytes.
    """
    x = jnp.asarray(x)
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    order = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
    # An odd factor keeps all bits of a value; another for each place, so order counts
    return jnp.sum((bits ^ (bits >> 15)) * (2 * order + 1), dtype=jnp.uint32)


@jax.jit
def _bit_sums(leaves: list[Array]) -> list[Array]:
    """One program for all, that the compile cache keeps; many small ones it would not."""
    return [bit_sum(x) for x in leaves]


def sums_of(tree: Tree) -> dict[str, int]:
    """Slash path -> `bit_sum` of every array of a tree. Waits until they are computed."""
    numbers = jax.device_get(_bit_sums(jax.tree.leaves(tree)))
    return dict(zip(paths_of(tree), map(int, numbers), strict=True))


def sum_of_json(value: Any) -> int:
    """CRC-32 of a value of JSON's types, whatever the order of its keys."""
    plain = json.loads(json.dumps(value))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def record(trees: Mapping[str, Tree], values: Mapping[str, Any]) -> dict[str, Any]:
    """The item `sums` of a checkpoint with these arrays and JSON items, by item."""
    return {
        "arrays": {name: sums_of(tree) for name, tree in trees.items()},
        "json": {name: sum_of_json(value) for name, value in values.items()},
    }


def verify(folder: pathlib.Path, tree: Tree) -> None:
    """Raises `UserError` unless `tree`, restored from an item's folder, is what was saved there.

    Only the arrays in `tree` are looked at. Checkpoints without sums, such as folders of
    parameters that other programs wrote, pass.
    """
    saved = _saved(folder, "arrays")
    if saved is None:
        return
    found = sums_of(tree)
    wrong = [f"'{path}'" for path, number in found.items() if saved.get(path) != number]
    if wrong:
        raise damaged(folder, f"not the values that were saved: {listed(wrong)}")


def check_names(folder: pathlib.Path, paths: Iterable[str]) -> None:
    """Raises `UserError` unless an item's folder says it has the arrays that were saved there."""
    saved = _saved(folder, "arrays")
    if saved is not None and (wrong := set(saved) ^ set(paths)):
        raise damaged(folder, f"other arrays than were saved: {listed(sorted(wrong))}")


def read_json(folder: pathlib.Path) -> Any:
    """A JSON item of a checkpoint; `UserError` if it is missing, torn, or not what was saved."""
    with reading(folder):
        value = ocp.JsonCheckpointHandler().restore(epath.Path(folder.resolve()))
    saved = _saved(folder, "json")
    if saved is not None and saved != sum_of_json(value):
        raise damaged(folder, "not what was saved")
    return value


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
    """Within it, whatever goes wrong with the files of an item is a `UserError`; see `damaged`.

    Of damaged files Orbax and tensorstore raise nearly every type there is, bare Exception too.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # told already, or not about files
    except Exception as error:
        raise damaged(folder, _words(error)) from error


def damaged(folder: pathlib.Path, what: str) -> UserError:
    """One sentence about an item of a checkpoint: which, what of it, and how to go on."""
    step = folder.parent
    found = f"{folder} cannot be restored ({what})"
    if not step.name.isdigit():
        return UserError(f"{found}: take another folder, or put a whole copy in its place")
    others = [int(p.name) for p in step.parent.iterdir() if p.name.isdigit()]
    earlier = [n for n in others if n < int(step.name)]
    if max(others, default=0) > int(step.name):
        mend = f"delete {step}, which is not the last one, and start again"
    elif earlier:
        mend = f"delete {step} and start again to go on from the checkpoint of step {max(earlier)}"
    else:
        mend = f"there is no earlier checkpoint; delete {step} to begin anew"
    return UserError(f"{found}: put a whole copy in its place if there is one, or {mend}")


def _saved(folder: pathlib.Path, kind: str) -> Any:
    """What the checkpoint's sums hold of the item in `folder`; None if it has no sums."""
    sums = folder.resolve().parent / ITEM
    if not sums.is_dir():
        return None
    with reading(sums):
        found = ocp.JsonCheckpointHandler().restore(epath.Path(sums))
        return found[kind][folder.name]


def _words(error: Exception) -> str:
    """What another library says, without its settings, briefly: of files, the last one named."""
    text = str(error).split(" [tensorstore_spec=")[0].split("See full TensorStore details")[0]
    text = " ".join(text.split())
    named: Sequence[tuple[str, str]] = re.findall(r'local file "([^"]*)":? ?([^"]*)', text)
    if named:
        path, rest = named[-1]
        text = f"{pathlib.Path(path).name}: {rest or text}"
    return f"{type(error).__name__}: {text[:LONGEST]}"
