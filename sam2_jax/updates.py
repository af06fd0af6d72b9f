"""From gradients to updates: the clip over all parameters, then each parameter by itself."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from sam2_jax.methods import Values
from sam2_jax.rules import Tree, path_of
from sam2_jax.schedules import Schedule
from sam2_jax.types import Array

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm
Options = Mapping[str, float | Schedule]  # value of every option of a group


class UpdateState(NamedTuple):
    """Of a group: optax's own state of each parameter by itself, with a count where it counts."""

    step: Int[Array, ""]  # updates done, which schedules see
    leaves: Tree


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

    The direction is taken of each parameter by itself: where `active[activity_of[path]]`
    (`active` is an argument of `update`) is False, value, moments and count stay as they are,
    whatever the method.
    """

    def init(params: Tree) -> UpdateState:
        begin = direction(values_at(options, 0)).init
        return UpdateState(jnp.zeros((), jnp.int32), jax.tree.map(begin, params))

    def update(updates, state, params=None, **extra):
        active = extra["active"]
        values = values_at(options, state.step)
        transform = direction(values)

        def leaf(keys, grad, kept, param):
            path = path_of(keys)
            step, new = transform.update(grad, kept, param)
            rate = values["learning_rate"] * scales[path]
            on = jnp.asarray(active[activity_of[path]])
            step = jnp.where(on, -rate * (step + values["weight_decay"] * param), 0.0)
            return step, jax.tree.map(lambda a, b: jnp.where(on, a, b), new, kept)

        grads, tree = jax.tree_util.tree_flatten_with_path(updates)
        kept, old = tree.flatten_up_to(state.leaves), tree.flatten_up_to(params)
        both = [
            leaf(keys, grad, *rest) for (keys, grad), *rest in zip(grads, kept, old, strict=True)
        ]
        steps, leaves = zip(*both, strict=True) if both else ((), ())
        return tree.unflatten(steps), UpdateState(state.step + 1, tree.unflatten(leaves))

    return optax.GradientTransformationExtraArgs(init, update)
