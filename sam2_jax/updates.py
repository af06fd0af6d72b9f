"""From gradients to updates: the clip over all parameters, then the method of each group."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Int

from sam2_jax.methods import Values
from sam2_jax.rules import Tree, path_of, paths_of
from sam2_jax.schedules import Schedule
from sam2_jax.types import Array

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm
Options = Mapping[str, float | Schedule]  # value of every option of a group


class UpdateState(NamedTuple):
    """Of a group: optax's own state of those parameters that are active together, by their kind."""

    step: Int[Array, ""]  # updates done, which schedules see
    kinds: dict[str, Any]  # of each a count of its own, where the method counts


def values_at(options: Options, step: int | Array) -> Values:
    """The options after `step` updates; what never changes stays a Python number."""
    return {name: x(step) if callable(x) else x for name, x in options.items()}


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales by max_norm / (norm + 1e-6), at most 1: torch's formula, which optax's is not."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + CLIP_EPSILON), 1.0)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def update_leaves(
    direction: Callable[[Values], optax.GradientTransformation],
    options: Options,
    scales: Mapping[str, float],
    activity_of: Mapping[str, str],
) -> optax.GradientTransformationExtraArgs:
    """-rate * scale * (direction + decay * parameter) for a group; decay is decoupled.

    Where `active[activity_of[path]]` (`active` is an argument of `update`) is False, value, moments
    and count stay as they are, whatever the method.
    """

    def by_kind(tree: Tree) -> dict[str, Tree]:
        flat: dict[str, dict[tuple[str, ...], Array]] = {}
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            path = path_of(keys)
            flat.setdefault(activity_of[path], {})[tuple(path.split("/"))] = leaf
        return {kind: traverse_util.unflatten_dict(leaves) for kind, leaves in flat.items()}

    def init(params: Tree) -> UpdateState:
        begin = direction(values_at(options, 0)).init
        kinds = {kind: begin(tree) for kind, tree in by_kind(params).items()}
        return UpdateState(jnp.zeros((), jnp.int32), kinds)

    def update(updates, state, params=None, **extra):
        values = values_at(options, state.step)
        transform = direction(values)
        kept = by_kind(params)
        steps: dict[str, Array] = {}
        kinds = {}
        for kind, grads in by_kind(updates).items():
            on = jnp.asarray(extra["active"][kind])
            old = state.kinds[kind]
            directions, new = transform.update(grads, old, kept[kind])
            kinds[kind] = jax.tree.map(functools.partial(jnp.where, on), new, old)
            both = zip(
                paths_of(grads), *map(jax.tree.leaves, (directions, kept[kind])), strict=True
            )
            for path, step, param in both:
                rate = values["learning_rate"] * scales[path]
                step = -rate * (step + values["weight_decay"] * param)
                steps[path] = jnp.where(on, step, 0.0)
        tree = jax.tree_util.tree_map_with_path(lambda keys, _: steps[path_of(keys)], updates)
        return tree, UpdateState(state.step + 1, kinds)

    return optax.GradientTransformationExtraArgs(init, update)
