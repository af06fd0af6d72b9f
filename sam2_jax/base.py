"""The weights under a LoRA run, whose checkpoints hold what is trained and name the rest."""

import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2_jax import integrity
from sam2_jax.lora import Rules
from sam2_jax.rules import Tree, paths_of
from sam2_jax.types import UserError

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
    with integrity.reading(folder):
        found = Base(**integrity.read_json(folder))
        rules = tuple((tuple(globs), rank, alpha) for globs, rank, alpha in found.rules)
        return found._replace(rules=rules)


def fingerprint(params: Tree) -> str:
    """32 hexadecimal digits that the values have, on any devices and from any format.

    Made to notice other weights, not forged ones.
    """
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    values = zip(paths_of(params), map(np.shape, jax.tree.leaves(params)), strict=True)
    numbers = integrity.sums_of(single).values()
    text = repr([(*value, number) for value, number in zip(values, numbers, strict=True)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check(base: Base, params: Tree, path: Any, key: str) -> None:
    """Raises `UserError` unless `params`, which `path` holds, are those that `base` is about."""
    if (found := fingerprint(params)) != base.fingerprint:
        raise UserError(
            f"{key}={path} holds other weights (fingerprint {found}) than those that this LoRA run "
            f"was trained on (fingerprint {base.fingerprint}): give the latter, once {base.path}"
        )
