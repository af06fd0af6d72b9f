"""The weights under a LoRA run, whose checkpoints hold what is trained and name the rest."""

import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sam2_jax.lora import Rules
from sam2_jax.rules import Tree, paths_of
from sam2_jax.types import Array, UserError

ITEM = "lora"  # of a checkpoint


class Base(NamedTuple):
    """What a checkpoint of a LoRA run says of the rest of its model."""

    path: str  # of the weights, absolute
    fingerprint: str  # of their values, whatever their format
    rules: Rules


def read(step: pathlib.Path) -> Base | None:
    """The base of the checkpoint in the folder `step`; None if it is a whole one."""
    folder = step.resolve() / ITEM
    if not folder.is_dir():
        return None
    try:
        found = Base(**ocp.JsonCheckpointHandler().restore(epath.Path(folder)))
        rules = tuple((tuple(globs), rank, alpha) for globs, rank, alpha in found.rules)
        return found._replace(rules=rules)
    except (OSError, ValueError, TypeError) as e:
        raise UserError(
            f"{folder} cannot be read ({e}): this checkpoint is not whole; take an earlier one"
        ) from e


def fingerprint(params: Tree) -> str:
    """32 hexadecimal digits that the values have, on any devices and from any format.

    Made to notice other weights, not forged ones. Sums of integers, hence exact in any order.
    """

    @jax.jit
    def sums(leaves: list[Array]) -> list[Array]:
        def one(x: Array) -> Array:
            bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
            order = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
            # An odd factor keeps all bits of a value; another for each place, so order counts
            return jnp.sum((bits ^ (bits >> 15)) * (2 * order + 1), dtype=jnp.uint32)

        return [one(x) for x in leaves]

    values = zip(paths_of(params), map(np.shape, jax.tree.leaves(params)), strict=True)
    numbers = [int(x) for x in jax.device_get(sums(jax.tree.leaves(params)))]
    text = repr([(*value, number) for value, number in zip(values, numbers, strict=True)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check(base: Base, params: Tree, path: Any, key: str) -> None:
    """Raises `UserError` unless `params`, which `path` holds, are those that `base` is about."""
    if (found := fingerprint(params)) != base.fingerprint:
        raise UserError(
            f"{key}={path} holds other weights (fingerprint {found}) than those that this LoRA run "
            f"was trained on (fingerprint {base.fingerprint}): give the latter, once {base.path}"
        )
