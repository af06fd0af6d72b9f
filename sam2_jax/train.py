"""One training step, as a pure function, and how it is laid over the mesh.

`make_train_step` knows neither model nor config: what it differentiates, draws and updates is
passed in, and `make_loss` and friends build those from a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Int, PRNGKeyArray

from sam2_jax import losses, optim, prompts, rules, sharding, track
from sam2_jax.types import Array, Batch, PromptPlan

Params = Any  # nested dict of arrays
RandomKey = PRNGKeyArray
Metrics = dict[str, Array]  # scalars
# (params, batch, plan, key) -> (loss, scalar terms); the loss is summed over what the batch holds
# on all devices.
LossFn = Callable[[Params, Batch, PromptPlan, RandomKey], tuple[Array, Metrics]]
# Leaves that a bfloat16 step computes with in bfloat16. All others, few and small, stay float32 and
# keep what they are added to in float32: embeddings, norms, biases, random frequencies.
KERNELS = ("kernel", "dwconv_kernel")


class State(NamedTuple):
    """Everything that a step changes. Float32; laid out by `state_shardings`."""

    step: Int[Array, ""]  # updates done
    params: Params
    opt_state: optax.OptState


TrainStep = Callable[[State, Batch, RandomKey], tuple[State, Metrics]]


def init_state(params: Params, tx: optax.GradientTransformation) -> State:
    """State before the first step."""
    return State(jnp.zeros((), jnp.int32), params, tx.init(params))


def compute_copy(params: Params, dtype: Any) -> Params:
    """The parameters with the kernels in the dtype of the computation."""

    def cast(keys: Any, leaf: Array) -> Array:
        name = rules.path_of(keys).rsplit("/", 1)[-1]
        return leaf.astype(dtype) if name in KERNELS else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def make_gather(mesh: Mesh) -> Callable[[Params], Params]:
    """Brings sharded parameters together on every device; gradients are scattered back.

    To be called once a step, outside the scan over frames: so the number of gathers does not
    grow with the number of frames. On a mesh without `fsdp` the identity.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda params: params

    @jax.custom_vjp
    def gather(params: Params) -> Params:
        return jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))

    def forward(params: Params) -> tuple[Params, None]:
        return gather(params), None

    def backward(_: None, grads: Params) -> tuple[Params]:
        # Without this the gradients would be summed whole on every device.
        return (jax.lax.with_sharding_constraint(grads, sharding.tree_shardings(grads, mesh)),)

    gather.defvjp(forward, backward)
    return gather


def make_train_step(
    optimizer: optim.Optimizer,
    *,
    loss_fn: LossFn,
    sample_plan: Callable[[RandomKey], PromptPlan],
    active: Callable[[PromptPlan], dict[str, Array]] = optim.active_groups,
    precision: str = "float32",
    gather: Callable[[Params], Params] = lambda params: params,
) -> TrainStep:
    """train_step(state, batch, run_key) -> (state, metrics), to be jitted with donated state.

    All randomness is fold_in(run_key, step), so that a resumed run draws what it would have
    drawn. Metrics: `loss`, the terms, `grad_norm` before clipping, learning rates.
    """
    dtype = jnp.dtype(precision)

    def train_step(state: State, batch: Batch, run_key: RandomKey) -> tuple[State, Metrics]:
        plan_key, loss_key = jax.random.split(jax.random.fold_in(run_key, state.step))
        plan = sample_plan(plan_key)

        def loss_of(params: Params) -> tuple[Array, Metrics]:
            return loss_fn(gather(compute_copy(params, dtype)), batch, plan, loss_key)

        (loss, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.tx.update(
            grads, state.opt_state, state.params, active=active(plan)
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **terms, "grad_norm": optax.tree.norm(grads)}
        for name, schedule in optimizer.schedules.items():
            metrics[name] = jnp.asarray(schedule(state.step))
        return State(state.step + 1, params, opt_state), metrics

    return train_step


def state_shardings(shapes: State, mesh: Mesh) -> State:
    """Where each array of a state lies."""
    return sharding.tree_shardings(shapes, mesh)


def jit_step(step: TrainStep, shapes: State, mesh: Mesh) -> TrainStep:
    """The step compiled for a mesh: state and batch sharded, state donated, metrics replicated."""
    state = state_shardings(shapes, mesh)
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(state, everywhere),
        donate_argnums=0,
    )


def make_loss(
    model: Any, weights: losses.LossWeights, remat: str, max_cond: int, points: bool
) -> LossFn:
    """Loss of tracking a batch through a plan with all that training has of randomness."""

    def loss_fn(
        params: Params, batch: Batch, plan: PromptPlan, key: RandomKey
    ) -> tuple[Array, Metrics]:
        out = track.track(
            model, params, batch, plan, key, max_cond=max_cond, remat=remat, points=points
        )
        masks = jnp.moveaxis(jnp.asarray(batch.masks), 1, 0)
        return losses.total(out, masks, batch.valid, weights)

    return loss_fn


def make_optim_settings(config: Any) -> optim.OptimSettings:
    """From the config's `optim` and `train` sections."""
    o = config.optim
    return optim.OptimSettings(
        learning_rate=o.learning_rate,
        weight_decay=o.weight_decay,
        frozen=o.frozen,
        layer_decay=o.layer_decay,
        layer_decay_min=o.layer_decay_min,
        layer_decay_overrides=o.layer_decay_overrides,
        steps=config.train.steps,
        warmup_steps=o.warmup_steps,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        clip_norm=o.clip_norm,
    )


def make_config_step(config: Any, model: Any, optimizer: optim.Optimizer, mesh: Mesh) -> TrainStep:
    """The step that a config describes, not yet jitted."""
    settings = prompts.PromptSettings(**config.prompts)
    points = settings.prob_points > 0 or config.data.num_frames == 1
    if not points:
        settings = settings._replace(corrections=0)
    weights = losses.LossWeights(**config.loss)
    # Corrected frames, too, become conditioning frames
    max_cond = max(settings.max_cond_frames, settings.max_corrected_frames)
    return make_train_step(
        optimizer,
        loss_fn=make_loss(model, weights, config.train.remat, max_cond, points),
        sample_plan=lambda key: prompts.sample_plan(key, config.data.num_frames, settings),
        precision=config.train.precision,
        gather=make_gather(mesh),
    )
