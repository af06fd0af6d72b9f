"""The step and the loop on a model of two matrices: exact resume, layout, records, precision."""

import functools
import json
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from sam2_jax import checkpoint, loop, optim, records, rules, sharding, train
from sam2_jax.types import Array, Batch, PromptPlan, UserError

BATCH = 4
PIXELS = 32
# float32 sums in another order: over the shards of a mesh, not over one device
RELATIVE = 1e-4


class Stop(Exception):
    """Stands for a run that is killed."""


def loss_fn(params, batch, plan, key) -> tuple[Array, train.Metrics]:
    """Reads everything that a step passes on: parameters, images, plan and randomness."""
    pixels = jnp.asarray(batch.images, jnp.float32).mean((1, 4)).reshape(BATCH, -1) / 255
    noise = jax.random.normal(key, (PIXELS**2,))
    hidden = jnp.tanh((pixels + 0.1 * noise) @ params["image_encoder"]["kernel"])
    out = hidden @ params["memory_attention"]["kernel"] + params["no_mem_embed"]
    truth = jnp.asarray(batch.masks, jnp.float32).mean((1, 3, 4))
    scale = jnp.where(plan.use_points, 1.0, 2.0)
    loss = scale * jnp.mean((out - truth) ** 2).astype(jnp.float32)
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
    return iter(data.to_iter_dataset(grain.ReadOptions(1, 2)))


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
    learning_rate=((("*",), 1e-2, 1e-3),),
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


def setup(mesh, precision="float32"):
    """(state, jitted step, shapes with shardings)."""
    params = init_params(jax.random.key(0))
    optimizer = optim.make_optimizer(SETTINGS, params, "2.1")
    init = functools.partial(train.init_state, tx=optimizer.tx)
    shapes = jax.eval_shape(init, params)
    layout = train.state_shardings(shapes, mesh)
    step = train.make_train_step(
        optimizer,
        loss_fn=loss_fn,
        sample_plan=sample_plan,
        precision=precision,
        gather=train.make_gather(mesh),
    )
    state = jax.jit(init, out_shardings=layout)(params)
    return state, train.jit_step(step, shapes, mesh), sharding.with_shardings(shapes, layout)


def fit(workdir: pathlib.Path, mesh, steps=10, stop_at=0, nan_at=0):
    """A run as scripts/train.py does it, killed at the start of the evaluation of `stop_at`."""
    state, step, like = setup(mesh)
    data = make_data()
    latest = checkpoint.latest_step(workdir)
    if latest is not None:
        rest = {"step": like.step, "moments": like.opt_state}
        params, rest = checkpoint.restore(workdir, latest, like.params, rest, data)
        state = train.State(rest["step"], params, rest["moments"])

    manager = checkpoint.make_manager(workdir, keep=2)

    def save(n, now):
        rest = {"step": now.step, "moments": now.opt_state}
        checkpoint.save(manager, n, now.params, rest, data)

    def evaluate(params, n):
        if n == stop_at:
            raise Stop
        return {"eval/J&F": float(params["memory_attention"]["kernel"].sum())}

    def spoiled(now, batch, key):
        n = int(now.step) + 1
        now, metrics = step(now, batch, key)
        return now, metrics | ({"loss": jnp.float32(np.nan)} if n == nan_at else {})

    try:
        return loop.run_loop(
            state,
            spoiled,
            data,
            jax.random.key(7),
            loop.LoopSettings(steps, log_every=2, eval_every=3, save_every=4),
            mesh,
            workdir=workdir,
            save=save,
            evaluate=evaluate,
        )
    finally:
        manager.wait_until_finished()
        manager.close()


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "steps_per_second"} for line in lines
    ]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    mesh = sharding.make_mesh(2, 2, 1)
    whole = fit(tmp_path / "whole", mesh)
    with pytest.raises(Stop):
        fit(tmp_path / "torn", mesh, stop_at=6)
    assert [r["step"] for r in rows(tmp_path / "torn")][-1] == 6  # later than checkpoint 4
    with (tmp_path / "torn/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = fit(tmp_path / "torn", mesh)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")


def test_rows_and_checkpoints(tmp_path):
    fit(tmp_path, sharding.make_mesh(1, 1, 4))
    table = rows(tmp_path)
    logged = [r["step"] for r in table if "loss" in r]
    assert logged == [1, 2, 4, 6, 8, 10]  # first, every second, last
    assert [r["step"] for r in table if "eval/J&F" in r] == [3, 6, 9, 10]
    assert set(table[0]) == {"step", "loss", "loss_mask", "grad_norm", "learning_rate"}
    assert np.float32(table[0]["learning_rate"]) == np.float32(1e-2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "8"]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(UserError, match="loss of step 8 is nan"):
        fit(tmp_path, sharding.make_mesh(1, 1, 4), nan_at=8)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert rows(tmp_path)[-1]["step"] == 6


def test_meshes_agree():
    results = []
    for axes in ((1, 1, 4), (4, 1, 1), (2, 2, 1), (1, 4, 1)):
        mesh = sharding.make_mesh(*axes)
        state, step, _ = setup(mesh)
        kernel = state.params["image_encoder"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[0] == PIXELS**2 // axes[1]
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

    def spy(params, batch, plan, key) -> tuple[Array, train.Metrics]:
        leaves = jax.tree.leaves(params)
        seen.update({k: v.dtype for k, v in zip(rules.paths_of(params), leaves, strict=True)})
        return loss_fn(params, batch, plan, key)

    params = init_params(jax.random.key(0))
    optimizer = optim.make_optimizer(SETTINGS, params, "2.1")
    step = train.make_train_step(
        optimizer, loss_fn=spy, sample_plan=sample_plan, precision="bfloat16"
    )
    state, metrics = jax.jit(step)(
        train.init_state(params, optimizer.tx), example(0), jax.random.key(0)
    )
    for path, dtype in seen.items():
        assert dtype == (jnp.bfloat16 if path.endswith("kernel") else jnp.float32), path
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics["grad_norm"].dtype == jnp.float32


def test_each_step_draws_anew_and_reproducibly():
    mesh = sharding.make_mesh(1, 1, 4)
    state, step, _ = setup(mesh)
    batch = sharding.put_batch(example(0), mesh)
    copy = jax.tree.map(jnp.copy, state)
    later = jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(5))
    first = step(state, batch, jax.random.key(1))[1]["loss"]
    assert first == step(copy, batch, jax.random.key(1))[1]["loss"]
    assert first != step(later, batch, jax.random.key(1))[1]["loss"]


@pytest.mark.parametrize("step", [0, 7])
def test_curves_of_a_run_that_died_are_purged(tmp_path, step):
    records.Records(tmp_path, step).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [step + 1]


def test_cut_after_keeps_whole_rows_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/J": 0.5}\n{"step": 3}\n{"st')
    records.cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/J": 0.5}\n'
    assert records.plain(float("inf")) is None
