"""Our side: the training step of a config with a plan that is given instead of drawn."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from sam2_jax import losses, objective, recipe, sharding, train, work
from sam2_jax.model import growing
from sam2_jax.model.kernels import XLA, Kernel, make_kernel
from sam2_jax.model.sam2 import Sam2, init_params, make_sam2
from sam2_jax.types import Array, Batch, PromptPlan


class Side(NamedTuple):
    """What a step needs."""

    model: Sam2
    optimizer: Any
    shapes: train.State  # of the state before the first step
    mesh: Any


def make_side(config: Any, kernel: Kernel | None = None) -> Side:
    """Model, optimizer and shapes of a config, on one device; no parameter is made.

    `kernel` is an implementation of attention to take instead of the config's.
    """
    m = config.model
    dropouts = m.attention_dropout, m.dropout, m.drop_path
    model = make_sam2(
        m.variant, m.resolution, m.version, *dropouts, kernel or make_kernel(m.attention)
    )
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    optimizer, params = recipe.make_config_optimizer(config, params)
    state = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), params)
    return Side(model, optimizer, state, sharding.make_mesh(1, 1, 1, jax.devices()[:1]))


def make_step(config: Any, side: Side) -> Any:
    """step(state, batch, key, plan): that of `recipe.make_config_step`, but for the plan.

    The plan is an argument: one program serves all, with all their branches, as in training.
    """
    settings = config.prompts
    max_cond = max(settings.max_cond_frames, settings.max_corrected_frames)
    weights = losses.LossWeights(**config.loss)
    loss_fn = objective.make_loss(side.model, weights, config.train.remat, max_cond, True)

    def step(state: Any, batch: Batch, key: Any, plan: PromptPlan) -> tuple[Any, train.Metrics]:
        inner = train.make_train_step(
            side.optimizer,
            loss_fn=loss_fn,
            sample_plan=lambda key, num_frames: plan,
            mesh=side.mesh,
            precision=config.train.precision,
            reduce_precision=config.train.reduce_precision,
            lora_rules=config.lora.rules,
        )
        return inner(state, batch, key)

    return step


def batch_shapes(config: Any) -> Batch:
    """Shapes of a batch of a config."""
    b, t, o = config.data.batch_size, config.data.num_frames, config.data.max_objects
    side, shape = config.model.resolution, jax.ShapeDtypeStruct
    images: Any = shape((b, t, side, side, 3), jnp.uint8)
    masks: Any = shape((b, t, o, side, side), bool)
    valid: Any = shape((b, o), bool)
    return Batch(images, masks, valid)


@contextlib.contextmanager
def nothing_recomputed() -> Iterator[None]:
    """Within it programs are traced without rematerialisation, also where the model asks for it."""

    def plain(fun: Any, **_: Any) -> Any:
        return fun

    def known(fun: Any, *args: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fun, *args))

    with (
        mock.patch.object(jax, "checkpoint", plain),
        mock.patch.object(growing, "again", known),
    ):
        yield


def count(
    config: Any, plans: Mapping[str, Mapping[str, Array]], recomputed: bool = False
) -> dict[str, work.Scopes]:
    """Work of a step by plan and by path of scopes; nothing is run and no array is made.

    Of the algorithm: where a CPU has a form of its own for convolutions, the one for all other
    devices is counted. `recomputed`: with what the step computes again to save memory, of the
    kinds that `train.remat` and `model.attention` choose and those that the model always does.
    """
    side = make_side(config, None if recomputed else XLA)
    step = make_step(config, side)
    key: Any = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    given = side.shapes, batch_shapes(config), key
    made = {name: PromptPlan(**jax.tree.map(jnp.asarray, dict(p))) for name, p in plans.items()}
    with contextlib.nullcontext() if recomputed else nothing_recomputed():
        program = work.trace(step, *given, next(iter(made.values())))
    return {name: program.count_by_scope(*given, plan) for name, plan in made.items()}
