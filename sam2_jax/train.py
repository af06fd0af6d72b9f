"""One training step, as a pure function, and how it is laid over the mesh.

`make_train_step` knows neither model nor config: what it differentiates, draws and updates is
passed in (objective.py, prompts.py, optim.py).
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Int, Key, PRNGKeyArray

from sam2_jax import lora, optim, partition, prompts, rules, sharding
from sam2_jax.products import multiplying
from sam2_jax.types import Array, Batch, PromptPlan

Params = Any  # nested dict of arrays
RandomKey = PRNGKeyArray
RandomKeys = Key[jax.Array, " b"]  # one for each video
Metrics = dict[str, Array]  # scalars
# (params, a batch of one video, plan, key, objects) -> (loss, scalar terms); what is summed over
# the video's objects is divided by `objects`, those of the whole batch on all devices, so that the
# losses of all videos add up to that of the batch.
LossFn = Callable[[Params, Batch, PromptPlan, RandomKey, Array], tuple[Array, Metrics]]
# Leaves that a bfloat16 step computes with in bfloat16. All others, few and small, stay float32 and
# keep what they are added to in float32: embeddings, norms, biases, random frequencies.
KERNELS = ("kernel", "dwconv_kernel")


class State(NamedTuple):
    """Everything that a step changes, and the frozen parameters. Float32; see `state_shardings`.

    Frozen kernels have no second copy in the compute dtype: each step casts them anew, and the
    copy lives only as long as the step reads it. Held in bfloat16 alone they could not be saved.
    """

    step: Int[Array, ""]  # updates done
    params: Params  # of the model, LoRA's among them
    opt_state: optax.OptState  # of the trained parameters only
    ema: Params | None = None  # moving average of the trained parameters
    skipped: Int[Array, ""] | int = 0  # steps in a row, the last one included, that were not finite


TrainStep = Callable[[State, Batch, RandomKey], tuple[State, Metrics]]


def split_params(params: Params, optimizer: optim.Optimizer) -> tuple[Params, Params]:
    """(trained, frozen) parameters, nested dicts."""
    return partition.split(params, lambda path: optimizer.labels[path] != optim.FROZEN)


def begin_ema(params: Params, optimizer: optim.Optimizer) -> Params:
    """The moving average before the first step: a copy, so that none is biased towards zero."""
    return jax.tree.map(jnp.copy, split_params(params, optimizer)[0])


def init_state(params: Params, optimizer: optim.Optimizer, ema: bool = False) -> State:
    """State before the first step, `ema`: with a moving average."""
    trained, _ = split_params(params, optimizer)
    average = begin_ema(params, optimizer) if ema else None
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, optimizer.tx.init(trained), average, zero)


def best_params(state: State) -> Params:
    """The parameters to evaluate: where there is a moving average, its values."""
    return state.params if state.ema is None else partition.join(state.params, state.ema)


def compute_copy(params: Params, dtype: Any) -> Params:
    """The parameters with the kernels in the dtype of the computation."""

    def cast(keys: Any, leaf: Array) -> Array:
        name = rules.path_of(keys).rsplit("/", 1)[-1]
        return leaf.astype(dtype) if name in KERNELS else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def make_train_step(
    optimizer: optim.Optimizer,
    *,
    loss_fn: LossFn,
    sample_plan: Callable[[RandomKey, int], PromptPlan],
    mesh: Mesh,
    active: Callable[[PromptPlan], dict[str, Array]] = optim.active_groups,
    precision: str = "float32",
    lora_rules: lora.Rules = (),
    reduce_precision: str = "float32",
    accumulate: int = 1,
    ema_decay: float = 0.0,
    skip: bool = False,
) -> TrainStep:
    """train_step(state, batch, run_key) -> (state, metrics), to be jitted with donated state.

    All randomness is fold_in(run_key, step), so that a resumed run draws what it would have
    drawn. `sample_plan` is given the number of frames, which may differ from batch to batch: each
    shape of a batch is compiled once. The batch is worked off in `accumulate` parts, one after the
    other, for the gradients of the whole. The plan is one for the whole batch; dropout and the
    places of clicks and boxes are drawn for each video, the same whatever the number of parts and
    devices. Kernels' gradients are summed over the devices in `reduce_precision`, others in
    float32.
    Where loss or gradient is not finite nothing is updated, and the state counts it; with `skip`
    the next step goes on, without it no later step changes anything either, so that the state
    stays the one on which it happened. Metrics: `loss`, the terms, norms of gradient (before
    clipping) and update, whole and of each part of the model, rates, `skipped_in_a_row`, `passes`
    (see `prompts.taught_passes`).
    """
    dtype, reduced = jnp.dtype(precision), jnp.dtype(reduce_precision)

    def learns(path: str) -> bool:
        """Whether a parameter of the model gets a gradient: its own, or for its adapter."""
        folder, _, name = path.rpartition("/")
        leaves = [path, f"{folder}/{lora.LEAVES[-1]}"] if name == "kernel" else [path]
        return any(optimizer.labels.get(leaf, optim.FROZEN) != optim.FROZEN for leaf in leaves)

    def gradients(
        trained: Params, frozen: Params, batch: Batch, plan: PromptPlan, key: RandomKey
    ) -> tuple[Metrics, Params]:
        def merged(trained: Params) -> tuple[Params, Params]:
            whole = lora.merge(partition.join(frozen, trained), lora_rules)
            return partition.split(whole, learns)

        learnt, pull, constant = jax.vjp(merged, trained, has_aux=True)
        layouts = [sharding.tree_specs(tree, mesh) for tree in (learnt, constant)]
        videos = sharding.BATCH

        def on_device(
            learnt: Params,
            constant: Params,
            batch: Batch,
            keys: RandomKeys,
            plan: PromptPlan,
            objects: Array,
        ) -> tuple[Metrics, Params]:
            # Cast and gathered once, outside all loops; the gradients are of these copies
            learnt = sharding.gather(compute_copy(learnt, dtype), layouts[0])
            constant = sharding.gather(compute_copy(constant, dtype), layouts[1])

            def one_part(batch: Batch, keys: RandomKeys) -> tuple[Metrics, Params]:
                def loss_of(learnt: Params) -> tuple[Array, Metrics]:
                    params = partition.join(constant, learnt)
                    if len(keys) == 1:  # mapped over, a larger program
                        return loss_fn(params, batch, plan, keys[0], objects)

                    def one_video(video: Batch, key: RandomKey) -> tuple[Array, Metrics]:
                        alone = jax.tree.map(lambda x: x[None], video)
                        return loss_fn(params, alone, plan, key, objects)

                    each = jax.vmap(one_video)(batch, keys)
                    return jax.tree.map(lambda x: x.sum(0), each)

                (loss, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(learnt)
                return {"loss": loss, **terms}, wide(grads)

            metrics, grads = sum_of_parts(one_part, batch, keys, accumulate)
            # One sum over all devices, after all loops: XLA would put one into every turn of each
            metrics = jax.lax.psum(metrics, sharding.AXES)
            return metrics, sharding.sum_and_scatter(compute_copy(grads, reduced), layouts[0])

        on_devices = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(
                *layouts,
                sharding.shares(),
                videos,
                sharding.EVERYWHERE,
                sharding.EVERYWHERE,
            ),
            out_specs=(sharding.EVERYWHERE, layouts[0]),
            check_vma=False,  # the loops begin with constants, which it takes for something else
        )
        # A key for each video: its draws are the same on whatever mesh and in whatever part
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(batch.valid)))
        objects = batch.valid.sum()
        batch = sharding.pad_objects(batch, mesh)
        metrics, grads = on_devices(learnt, constant, batch, keys, plan, objects)
        return metrics, pull(wide(grads))[0]

    @multiplying(precision)
    def train_step(state: State, batch: Batch, run_key: RandomKey) -> tuple[State, Metrics]:
        plan_key, loss_key = jax.random.split(jax.random.fold_in(run_key, state.step))
        plan = sample_plan(plan_key, batch.images.shape[1])
        trained, frozen = split_params(state.params, optimizer)
        metrics, grads = gradients(trained, frozen, batch, plan, loss_key)
        metrics |= norms("grad_norm", grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if not skip:
            finite &= state.skipped == 0
        # Where it is not, nothing is active, so that all stays but the counts of steps
        groups = {name: on & finite for name, on in active(plan).items()}
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, trained, active=groups)
        trained = optax.apply_updates(trained, updates)
        ema = state.ema
        if ema is not None:
            share = jnp.where(finite, 1 - ema_decay, 0.0)
            ema = jax.tree.map(lambda old, new: old + share * (new - old), ema, trained)
        metrics |= norms("update_norm", updates)
        counted = jnp.where(finite, 0, state.skipped + 1)
        metrics["skipped_in_a_row"] = counted
        metrics["passes"] = prompts.taught_passes(plan)
        for name, schedule in optimizer.schedules.items():
            metrics[name] = jnp.asarray(schedule(state.step))
        step = state.step + (1 if skip else finite.astype(jnp.int32))
        return State(step, partition.join(frozen, trained), opt_state, ema, counted), metrics

    return train_step


def norms(name: str, tree: Params) -> Metrics:
    """Euclidean norm of a tree as `name`, and of its first level as `name`/..."""
    squares: dict[str, list[Array]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        part = rules.path_of(keys).split("/")[0]
        squares.setdefault(part, []).append(jnp.sum(jnp.square(leaf)))
    sums = {part: jnp.stack(found).sum() for part, found in squares.items()}
    found: Metrics = {f"{name}/{part}": jnp.sqrt(x) for part, x in sums.items()}
    found[name] = jnp.sqrt(jnp.stack(list(sums.values())).sum())
    return found


def sum_of_parts(
    one_part: Callable[[Batch, RandomKeys], tuple[Metrics, Params]],
    batch: Batch,
    keys: RandomKeys,
    parts: int,
) -> tuple[Metrics, Params]:
    """What `one_part` gives, summed over the parts of a batch, and of its keys, by a loop."""
    if parts == 1:
        return one_part(batch, keys)
    items = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (batch, keys))
    shapes = jax.eval_shape(one_part, *jax.tree.map(lambda x: x[0], items))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one_part(*item)), None

    return jax.lax.scan(add, zeros, items)[0]


def wide(tree: Params) -> Params:
    """All leaves in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def state_shardings(shapes: State, mesh: Mesh) -> State:
    """Where each array of a state lies."""
    return sharding.tree_shardings(shapes, mesh)


def jit_step(step: TrainStep, shapes: State, mesh: Mesh) -> TrainStep:
    """The step compiled for a mesh: state and batch sharded, state donated, metrics replicated."""
    state = state_shardings(shapes, mesh)
    everywhere = sharding.replicated(mesh)

    @functools.wraps(step)
    def traced(*args: Any) -> Any:
        with _nothing_collected():
            return step(*args)

    return jax.jit(
        traced,
        in_shardings=(state, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(state, everywhere),
        donate_argnums=0,
    )


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Within it Python looks for no garbage: tracing makes millions of objects, nearly all to stay,
    and looking through them over and over took a quarter of its time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
