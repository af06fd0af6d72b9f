"""The step on a model of two matrices: layout, precision, parts of a batch, averages."""

import functools
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import optim, rules, sharding, train
from sam2_jax.data import pipeline
from sam2_jax.types import Array, Batch, PromptPlan

BATCH = 4
PIXELS = 32
ALONE = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
# float32 sums in another order: over the shards of a mesh, not over one device
RELATIVE = 1e-4


class Stop(Exception):
    """Stands for a run that is killed."""


def loss_fn(params, batch, plan, key, objects, spread=0.1) -> tuple[Array, train.Metrics]:
    """Reads everything that a step passes on: parameters, images, plan, randomness, objects."""
    pixels = jnp.asarray(batch.images, jnp.float32).mean((1, 4)).reshape(len(batch.images), -1)
    pixels, noise = pixels / 255, spread * jax.random.normal(key, (PIXELS**2,))
    hidden = jnp.tanh((pixels + noise) @ params["image_encoder"]["kernel"])
    out = hidden @ params["memory_attention"]["kernel"] + params["no_mem_embed"]
    truth = jnp.asarray(batch.masks, jnp.float32).mean((1, 3, 4))
    scale = jnp.where(plan.use_points, 1.0, 2.0)
    loss = scale * (batch.valid * (out - truth) ** 2).sum().astype(jnp.float32) / objects
    return loss, {"loss_mask": loss / 2}


def sample_plan(key, t: int = 3) -> PromptPlan:
    none = jnp.zeros(t, bool)
    return PromptPlan(
        jnp.arange(t, dtype=jnp.int32),
        jax.random.bernoulli(key),
        jnp.arange(t) == 0,
        none,
        none,
        jnp.zeros((t, 7), bool),
    )


def example(i: int) -> Batch:
    rng = np.random.default_rng(i)
    return Batch(
        rng.integers(0, 255, (BATCH, 3, PIXELS, PIXELS, 3)).astype(np.uint8),
        rng.random((BATCH, 3, 2, PIXELS, PIXELS)) < 0.5,
        np.ones((BATCH, 2), bool),
    )


def make_data():
    data = grain.MapDataset.range(1000).seed(0).shuffle().repeat().map(example)
    return pipeline.Loader(data, 0, lambda n: [("train", f"clip{n}")], {"train": 1000})


def init_params(key):
    a, b = jax.random.split(key)
    return {
        "image_encoder": {"kernel": 0.05 * jax.random.normal(a, (PIXELS**2, 64))},
        "memory_attention": {"kernel": 0.1 * jax.random.normal(b, (64, 2))},
        "memory_encoder": {"kernel": jnp.ones((2, 2))},
        "obj_ptr_proj": {"kernel": jnp.ones(2)},
        "obj_ptr_tpos_proj": {"kernel": jnp.ones(2)},
        "mask_downsample": {"kernel": jnp.ones(2)},
        "gaussian": jnp.full((2, 2), 1 / 3),
        "maskmem_tpos_enc": jnp.ones(2),
        "no_mem_embed": jnp.zeros(2),
        "no_mem_pos_enc": jnp.zeros(2),
        "no_obj_ptr": jnp.zeros(2),
        "no_obj_embed_spatial": jnp.zeros(2),
    }


SETTINGS = optim.OptimSettings(
    learning_rate=("cosine", 1e-2, 1e-3),
    weight_decay=((("*",), 0.1),),
    frozen=("gaussian",),
    layer_decay=1.0,
    layer_decay_min=0.0,
    layer_decay_overrides=(),
    steps=12,
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    clip_norm=1.0,
)


def make_optimizer(frozen=("gaussian",), params=None):
    settings = SETTINGS._replace(frozen=frozen)
    return optim.make_optimizer(settings, params or init_params(jax.random.key(0)), "2.1")


def setup(mesh, precision="float32", ema_decay=0.0, skip=False):
    """(state, jitted step, shapes with shardings)."""
    params = init_params(jax.random.key(0))
    optimizer = make_optimizer()
    init = functools.partial(train.init_state, optimizer=optimizer, ema=ema_decay > 0)
    shapes = jax.eval_shape(init, params)
    layout = train.state_shardings(shapes, mesh)
    step = train.make_train_step(
        optimizer,
        loss_fn=loss_fn,
        sample_plan=sample_plan,
        mesh=mesh,
        precision=precision,
        ema_decay=ema_decay,
        skip=skip,
    )
    state = jax.jit(init, out_shardings=layout)(params)
    return state, train.jit_step(step, shapes, mesh), sharding.with_shardings(shapes, layout)


def test_meshes_agree():
    results = []
    for axes in ((1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 4, 1)):
        mesh = sharding.make_mesh(*axes, jax.devices()[: np.prod(axes)])
        state, step, _ = setup(mesh)
        kernel = state.params["image_encoder"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (PIXELS**2, 64 // axes[1])
        batch = sharding.put_batch(example(0), mesh)
        state, metrics = step(state, batch, jax.random.key(1))
        # Moments, not parameters: Adam divides rounding by rounding where a gradient is near 0.
        results.append(jax.device_get((state.opt_state, metrics)))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=RELATIVE, atol=1e-7),
            results[0],
            other,
        )


def test_parameters_are_gathered_once_and_gradients_scattered():
    mesh = sharding.make_mesh(1, 4, 1)
    state, step, like = setup(mesh)
    text = step.lower(state, example(0), jax.random.key(0)).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    big = [line for line in gathers if f"f32[{PIXELS**2},64]" in line.split("=")[1]]
    assert len(big) == 1, gathers
    assert like.opt_state is not None


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    seen = {}

    def spy(params, batch, plan, key, objects) -> tuple[Array, train.Metrics]:
        leaves = jax.tree.leaves(params)
        seen.update({k: v.dtype for k, v in zip(rules.paths_of(params), leaves, strict=True)})
        return loss_fn(params, batch, plan, key, objects)

    params = init_params(jax.random.key(0))
    optimizer = optim.make_optimizer(SETTINGS, params, "2.1")
    step = train.make_train_step(
        optimizer, loss_fn=spy, sample_plan=sample_plan, mesh=ALONE, precision="bfloat16"
    )
    state, metrics = jax.jit(step)(
        train.init_state(params, optimizer), example(0), jax.random.key(0)
    )
    for path, dtype in seen.items():
        assert dtype == (jnp.bfloat16 if path.endswith("kernel") else jnp.float32), path
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics["grad_norm"].dtype == jnp.float32


def test_each_step_draws_anew_and_reproducibly():
    mesh = sharding.make_mesh(4, 1, 1)
    state, step, _ = setup(mesh)
    batch = sharding.put_batch(example(0), mesh)
    copy = jax.tree.map(jnp.copy, state)
    later = jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(5))
    first = step(state, batch, jax.random.key(1))[1]["loss"]
    assert first == step(copy, batch, jax.random.key(1))[1]["loss"]
    assert first != step(later, batch, jax.random.key(1))[1]["loss"]


def run_step(
    frozen=("gaussian",), ema=None, spread=0.0, state=None, **how
) -> tuple[train.State, train.State, Any]:
    """(state before, state after, metrics) of one step on one device."""
    optimizer = make_optimizer(frozen)
    loss = functools.partial(loss_fn, spread=spread)
    mesh = how.pop("mesh", ALONE)
    decay = {"ema_decay": ema} if ema else {}
    step = train.make_train_step(
        optimizer, loss_fn=loss, sample_plan=sample_plan, mesh=mesh, **decay, **how
    )
    if state is None:
        state = train.init_state(init_params(jax.random.key(0)), optimizer, ema is not None)
    uneven = example(0)._replace(valid=np.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool))
    return state, *jax.jit(step)(state, sharding.put_batch(uneven, mesh), jax.random.key(1))


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_add_up_to_the_whole(parts):
    # Adam's moments, not parameters: it divides rounding by rounding where a gradient is near 0
    _, whole, metrics = run_step()
    _, summed, others = run_step(accumulate=parts)
    for a, b in ((whole.opt_state, summed.opt_state), (metrics, others)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), a, b)
    sharded = run_step(accumulate=2, mesh=sharding.make_mesh(1, 2, 1, jax.devices()[:2]))[2]
    np.testing.assert_allclose(sharded["grad_norm"], metrics["grad_norm"], rtol=1e-5)


def test_draws_are_a_video_s_own():
    """The same in every part and on every mesh, and not those of another video."""
    two = sharding.make_mesh(2, 1, 1, jax.devices()[:2])
    ways: list[dict[str, Any]] = [{}, {"accumulate": 2}, {"accumulate": 4}, {"mesh": two}]
    losses = [run_step(spread=0.5, **way)[2]["loss"].item() for way in ways]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    batch = jax.tree.map(lambda x: np.repeat(x[:1], BATCH, 0), example(0))
    state, step, _ = setup(ALONE)
    _, metrics = step(state, batch, jax.random.key(1))
    alone, step, _ = setup(ALONE)
    one = jax.tree.map(lambda x: x[:1], batch)
    same = step(alone, one, jax.random.key(1))[1]["loss"]
    assert float(same) != pytest.approx(float(metrics["loss"]), 1e-4)


def test_reduced_in_bfloat16_gradients_of_kernels_alone_are_rounded():
    exact, rounded = (
        run_step(reduce_precision=name, mesh=sharding.make_mesh(2, 2, 1))[2]
        for name in ("float32", "bfloat16")
    )
    assert rounded["grad_norm/no_mem_embed"] == exact["grad_norm/no_mem_embed"]
    name = "grad_norm/image_encoder"
    assert rounded[name] != exact[name]
    np.testing.assert_allclose(rounded[name], exact[name], rtol=2**-8)


def test_frozen_parameters_are_constants():
    before, after, metrics = run_step(("gaussian", "image_encoder/*"))
    kernel = before.params["image_encoder"]["kernel"]
    np.testing.assert_array_equal(after.params["image_encoder"]["kernel"], kernel)
    assert not any(x.shape == kernel.shape for x in jax.tree.leaves(after.opt_state))
    _, other, all_metrics = run_step()
    for path in ("memory_attention", "no_mem_embed"):
        assert not np.array_equal(jax.tree.leaves(after.params[path])[0], 0)
    np.testing.assert_array_equal(metrics["loss"], all_metrics["loss"])
    assert metrics["grad_norm"] < all_metrics["grad_norm"]
    assert np.any(other.params["image_encoder"]["kernel"] != kernel)


def test_the_average_follows_the_parameters():
    before, first, _ = run_step(ema=0.75)
    _, second, _ = run_step(ema=0.75, state=first)
    path = ("memory_attention", "kernel")
    p0, p1, p2 = (s.params[path[0]][path[1]] for s in (before, first, second))
    assert first.ema is not None and second.ema is not None
    want = 0.75 * (0.75 * p0 + 0.25 * p1) + 0.25 * p2
    np.testing.assert_allclose(second.ema[path[0]][path[1]], want, rtol=1e-5, atol=1e-8)
    assert "gaussian" not in second.ema
    best = train.best_params(second)
    np.testing.assert_array_equal(best[path[0]][path[1]], second.ema[path[0]][path[1]])
    np.testing.assert_array_equal(best["gaussian"], second.params["gaussian"])


def test_what_is_not_finite_changes_nothing_but_counts():
    broken = example(0)._replace(valid=np.zeros((BATCH, 2), bool))  # divides by no object
    for skip in (False, True):
        state, step, _ = setup(ALONE, skip=skip)
        before = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, broken, jax.random.key(0))
        assert not np.isfinite(metrics["loss"]) and metrics["skipped_in_a_row"] == 1
        jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
        kept = jax.tree.map(np.array_equal, state.opt_state, before.opt_state)
        assert sum(not same for same in jax.tree.leaves(kept)) == len(SETTINGS.weight_decay)
        assert (int(state.step), int(state.skipped)) == (int(skip), 1)
        state, metrics = step(state, example(1), jax.random.key(0))
        moved = not np.array_equal(
            state.params["image_encoder"]["kernel"], before.params["image_encoder"]["kernel"]
        )
        assert moved == skip  # without it all stays as it was when it happened
        assert int(metrics["skipped_in_a_row"]) == (0 if skip else 2)


def test_norms_of_the_parts_make_up_the_whole():
    state, step, _ = setup(ALONE)
    _, metrics = step(state, example(0), jax.random.key(0))
    for name in ("grad_norm", "update_norm"):
        parts = [float(v) for k, v in metrics.items() if k.startswith(f"{name}/")]
        assert len(parts) == len(init_params(jax.random.key(0))) - 1  # but for the frozen one
        assert np.sqrt(np.sum(np.square(parts))) == pytest.approx(float(metrics[name]), rel=1e-5)
