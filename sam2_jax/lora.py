"""Low-rank adaptation (arXiv 2106.09685): to a frozen kernel a product of two thin ones is added.

A kernel of shape (..., out) gets the leaves `lora_a` (..., rank) and `lora_b` (rank, out) beside
it, and computes as kernel + alpha / rank * lora_a @ lora_b. So a convolution gets one to `rank`
channels and a product behind it. Being siblings of the kernel they fall under the same rules for
rates, layer decay and activity; they are never written to files of weights, only merged.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sam2_jax import partition, schedules
from sam2_jax.methods import is_rule
from sam2_jax.rules import Tree, check_selectors, match_some, paths_of
from sam2_jax.types import UserError

KEY = "lora.rules"
LEAVES = ("lora_a", "lora_b")
Rules = Sequence[tuple[Sequence[str], int, float]]  # globs over paths of kernels, rank, alpha


class Adapter(NamedTuple):
    """What one kernel gets."""

    rank: int
    scale: float  # alpha / rank


def is_lora(path: str) -> bool:
    """Whether the leaf of this slash path is one of an adapter."""
    return path.rsplit("/", 1)[-1] in LEAVES


def check(rules: Any, also_train: Any) -> None:
    """Raises `UserError` unless both have the form that a config gives them."""
    for rule in rules:
        form = schedules.is_list(rule) and len(rule) == 3 and is_rule(rule[:2])
        if not form or type(rule[1]) is not int or not schedules.is_number(rule[2]):
            raise UserError(
                f"{KEY}: rule {rule!r} must be (globs, rank, alpha), globs a tuple of one string "
                "or more, rank a whole number, such as (('memory_attention/*',), 8, 16.0)"
            )
        if not 0 < rule[2] < math.inf:
            raise UserError(f"{KEY}: alpha of rule {rule!r} must be greater than 0 and finite")
    check_selectors("lora.also_train", also_train)
    if also_train and not rules:
        raise UserError(
            f"lora.also_train={also_train} names what is trained beside adapters, but {KEY} is "
            "empty: leave it empty too, and freeze the others by optim.frozen"
        )


def adapters(shapes: Tree, rules: Rules) -> dict[str, Adapter]:
    """Adapter of each kernel that a rule takes, the first that matches, by the kernel's path.

    `shapes` is a tree of parameters or their shapes, adapters among them or not. Only leaves called
    `kernel`, of any number of axes from 2, can have one. Raises `UserError` for a glob that takes
    no kernel and a rank that is not below what the kernel has.
    """
    if not rules:
        return {}
    leaves = dict(zip(paths_of(shapes), jax.tree.leaves(shapes), strict=True))
    kernels = [path for path in leaves if path.rsplit("/", 1)[-1] == "kernel"]
    result = {}
    found = match_some([selectors for selectors, _, _ in rules], kernels, KEY)
    for path, index in zip(kernels, found, strict=True):
        if index is None:
            continue
        _, rank, alpha = rules[index]
        *rows, columns = leaves[path].shape
        most = min(int(np.prod(rows)), columns)
        if not 1 <= rank <= most:
            raise UserError(
                f"{KEY}: rank {rank} of '{path}', whose shape is {[*rows, columns]}: expected 1 "
                f"to {most}; give it a rule of its own before the others, or narrower globs"
            )
        result[path] = Adapter(rank, alpha / rank)
    return result


def init(key: PRNGKeyArray, shapes: Tree, rules: Rules) -> Tree:
    """The leaves of all adapters, a nested dict of float32: `lora_a` random, `lora_b` zero.

    So the model is at first exactly what it was. A kernel's draw depends on its path alone, not on
    the other rules. Errors as in `adapters`.
    """
    leaves = dict(zip(paths_of(shapes), jax.tree.leaves(shapes), strict=True))
    tree: Tree = {}
    for path, adapter in adapters(shapes, rules).items():
        *rows, columns = leaves[path].shape
        reach = np.prod(rows) ** -0.5  # as torch draws a layer of so many inputs
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own, (*rows, adapter.rank), minval=-reach, maxval=reach)
        sub = {"lora_a": a, "lora_b": jnp.zeros((adapter.rank, columns))}
        for name in reversed(path.split("/")[:-1]):
            sub = {name: sub}
        tree = partition.join(tree, sub)
    return tree


def merge(params: Tree, rules: Rules) -> Tree:
    """Parameters with the adapters added to their kernels and taken out; pure, traceable."""
    if not rules:
        return params
    scales = {path: adapter.scale for path, adapter in adapters(params, rules).items()}

    def walk(tree: Tree, prefix: str) -> Tree:
        merged = {}
        for name, sub in tree.items():
            path = f"{prefix}{name}"
            if isinstance(sub, Mapping):
                merged[name] = walk(sub, f"{path}/")
            elif path in scales:
                # In full: what is exported is to be what was trained
                delta = jnp.tensordot(
                    tree["lora_a"], tree["lora_b"], 1, precision=jax.lax.Precision.HIGHEST
                )
                merged[name] = sub + scales[path] * delta
            elif name not in LEAVES:
                merged[name] = sub
        return merged

    return walk(params, "")


def frozen_paths(shapes: Tree, rules: Rules, also_train: Sequence[str]) -> tuple[str, ...]:
    """Paths of the base's parameters that LoRA freezes: all that no glob of `also_train` takes.

    Empty without rules. Raises `UserError` for a glob of `also_train` that takes no parameter.
    """
    if not rules:
        return ()
    paths = [path for path in paths_of(shapes) if not is_lora(path)]
    found = match_some([also_train], paths, "lora.also_train")
    return tuple(path for path, index in zip(paths, found, strict=True) if index is None)
