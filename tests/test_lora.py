"""Adapters: what they are, that they change nothing at first, small checkpoints, merging."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from sam2_jax import base as bases
from sam2_jax import (
    checkpoint,
    convert,
    initial,
    lora,
    optim,
    partition,
    recipe,
    resume,
    rules,
    sharding,
    snapshot,
    train,
    weights,
)
from sam2_jax import config as config_lib
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError

RULES = (
    (("memory_attention/*_proj/kernel",), 2, 4.0),
    (("mask_downsample/*", "sam_mask_decoder/upscale_*"), 1, 1.0),
)
KERNEL = "memory_attention/layers_0_self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def params() -> dict:
    """A random nano; numbers are drawn here, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(make_sam2("nano", 64), jax.random.key(0)))
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def adapted(params) -> dict:
    """The same with adapters that do something."""
    rng = np.random.default_rng(1)
    own = lora.init(jax.random.key(0), params, RULES)
    return partition.join(
        params, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), own)
    )


def leaf(tree, path: str) -> np.ndarray:
    return functools.reduce(lambda sub, name: sub[name], path.split("/"), tree)


def test_new_adapters_change_nothing(params):
    own = lora.init(jax.random.key(0), params, RULES)
    for path, x in zip(rules.paths_of(own), jax.tree.leaves(own), strict=True):
        assert np.any(x) == path.endswith("lora_a"), path
    jax.tree.map(
        np.testing.assert_array_equal, lora.merge(partition.join(params, own), RULES), params
    )


def test_merging_adds_the_scaled_product(params, adapted):
    merged = lora.merge(adapted, RULES)
    assert rules.paths_of(merged) == rules.paths_of(params)
    found = lora.adapters(params, RULES)
    assert found[KERNEL] == (2, 2.0) and "mask_downsample/kernel" in found
    for path, kernel in zip(rules.paths_of(params), jax.tree.leaves(params), strict=True):
        if path not in found:
            np.testing.assert_array_equal(leaf(merged, path), kernel)
            continue
        a = leaf(adapted, path.replace("kernel", "lora_a"))
        b = leaf(adapted, path.replace("kernel", "lora_b"))
        rank, scale = found[path]
        assert a.shape == (*kernel.shape[:-1], rank) and b.shape == (rank, kernel.shape[-1])
        flat = a.reshape(-1, rank).astype(np.float64) @ b
        want = kernel + scale * flat.reshape(kernel.shape)
        np.testing.assert_allclose(leaf(merged, path), want, rtol=1e-5, atol=1e-5)


def test_a_draw_depends_on_the_path_alone(params):
    few = lora.init(jax.random.key(0), params, RULES[:1])
    own = lora.init(jax.random.key(0), params, RULES)
    a = KERNEL.replace("kernel", "lora_a")
    np.testing.assert_array_equal(leaf(few, a), leaf(own, a))
    other = a.replace("layers_0", "layers_1")
    assert not np.array_equal(leaf(own, a), leaf(own, other))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (((("memory_atention/*",), 2, 1.0),), "lora.rules: 'memory_atention/.*nearest"),
        (((("*/bias",), 2, 1.0),), "lora.rules: '.*/bias' matches no"),
        (
            ((("mask_downsample/*",), 9, 1.0),),
            "rank 9 of 'mask_downsample/kernel'.*expected 1 to 1",
        ),
    ],
)
def test_rules_that_miss_are_named(params, wrong, words):
    with pytest.raises(UserError, match=words):
        lora.adapters(params, wrong)


def config(**changes):
    c = smoke.get_config()
    c.model.resolution = 64
    c.optim.learning_rate = ((("image_encoder/*",), 1e-3), (("*",), 2e-3))
    c.lora.rules = RULES
    c.checkpoint.init_from = "somewhere"
    flat = c.unlock() or c
    for key, value in changes.items():
        section, name = key.split("__")
        flat[section][name] = value
    return config_lib.finish(flat)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora__rules": ((("a",), 2),)}, r"must be \(globs, rank, alpha\)"),
        ({"lora__rules": ((("a",), 2, 0.0),)}, "alpha of rule .* greater than 0"),
        ({"lora__rules": (), "lora__also_train": ("a",)}, "lora.rules is empty"),
        ({"checkpoint__init_from": ""}, "lora.rules adapts weights that there are"),
        ({"train__ema_decay": 1.0}, "train.ema_decay=1.0 must be"),
        ({"train__accumulate": 0}, "train.accumulate=0 must be at least 1"),
    ],
)
def test_configs_that_cannot_work_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        config(**changes)


def test_only_adapters_and_named_layers_are_trained(params):
    c = config(lora__also_train=("no_obj_ptr", "*/norm/*"), optim__layer_decay=0.5)
    optimizer, shapes = recipe.make_config_optimizer(c, params)
    trained, frozen = train.split_params(shapes, optimizer)
    for path in rules.paths_of(trained):
        assert lora.is_lora(path) or path == "no_obj_ptr" or "/norm/" in path
    assert KERNEL in rules.paths_of(frozen) and "no_obj_ptr" in rules.paths_of(trained)
    assert set(optimizer.labels) == set(rules.paths_of(shapes))
    moments = [
        x.shape for x in jax.tree.leaves(optimizer.tx.init(jax.tree.map(jnp.zeros_like, trained)))
    ]
    assert sum(map(len, map(np.atleast_1d, moments))) and max(map(np.prod, moments)) < 2**14
    with pytest.raises(UserError, match=r"lora.also_train: 'no_obj_prt' matches no"):
        recipe.make_config_optimizer(config(lora__also_train=("no_obj_prt",)), params)
    with pytest.raises(UserError, match=r"optim.frozen=.*lora_a.* freezes the adapter"):
        recipe.make_config_optimizer(config(optim__frozen=("*lora_a",)), params)


def test_adapters_follow_the_rules_of_their_kernels(params):
    c = config(lora__rules=((("image_encoder/*qkv/kernel", "memory_attention/*"), 1, 1.0),))
    optimizer, shapes = recipe.make_config_optimizer(c, params)
    own = [path for path in rules.paths_of(shapes) if lora.is_lora(path)]
    labels = {path.split("/")[0]: optimizer.labels[path] for path in own}
    assert labels["image_encoder"] != labels["memory_attention"]
    assert optim.FROZEN not in labels.values()


def small_loss(tree, batch, plan, key, objects):
    del batch, plan, key
    kernel = leaf(tree, KERNEL)
    loss = ((kernel - 1) ** 2).sum() / objects + (leaf(tree, "no_obj_ptr") ** 2).sum()
    return loss, {}


def tiny_run(c, params, steps, tmp_path, resume=False):
    """A LoRA run of scripts/train.py without its data, model and loop: (state, base, optimizer)."""
    from tests import test_train

    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    shapes = jax.eval_shape(lambda: params)
    optimizer, shapes = recipe.make_config_optimizer(c, shapes)
    begin = functools.partial(train.init_state, optimizer=optimizer, ema=True)
    like = jax.eval_shape(begin, shapes)
    like = sharding.with_shardings(like, train.state_shardings(like, mesh))
    adapted, base = snapshot.load_base(c, like.params)
    if resume:
        step = checkpoint.latest_step(tmp_path) or 0
        frozen = snapshot.frozen_of_base(c, tmp_path, step, adapted, optimizer)
        state, _ = snapshot.restore(tmp_path, step, like, optimizer, frozen)
    else:
        state = begin(snapshot.with_adapters(c, adapted, like.params))
    step_fn = train.make_train_step(
        optimizer,
        loss_fn=small_loss,
        sample_plan=test_train.sample_plan,
        mesh=mesh,
        lora_rules=c.lora.rules,
        ema_decay=0.5,
    )
    step_fn = jax.jit(step_fn)
    losses = []
    with checkpoint.make_manager(tmp_path, checkpoint.Keep(2)) as manager:
        for _ in range(steps):
            state, metrics = step_fn(state, test_train.example(0), jax.random.key(0))
            losses.append(float(metrics["loss"]))
        snapshot.save(manager, int(state.step), state, optimizer, {}, base)
        manager.wait_until_finished()
    return state, losses


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    """(config, workdir, state after 4 steps, losses) of a LoRA run with a moving average."""
    root = tmp_path_factory.mktemp("lora")
    weights.write(root / "base.safetensors", convert.to_reference(params))
    c = config(
        checkpoint__init_from=str(root / "base.safetensors"), lora__also_train=("no_obj_ptr",)
    )
    state, losses = tiny_run(c, params, 4, root / "run")
    model = {"variant": "nano", "resolution": 64, "version": "2.1"}
    resume.write_config(root / "run", json.dumps({"model": model}))
    return c, root / "run", state, losses


def test_a_run_trains_adapters_and_nothing_else(run, params):
    c, workdir, state, losses = run
    assert losses[-1] < losses[0]
    merged = lora.merge(state.params, c.lora.rules)
    moved = [
        path
        for path, a, b in zip(
            rules.paths_of(params), jax.tree.leaves(merged), jax.tree.leaves(params), strict=True
        )
        if not np.array_equal(a, b)
    ]
    # Weight decay alone does not move the others: their second factor is zero
    assert set(moved) == {KERNEL, "no_obj_ptr"}


def test_checkpoints_are_small_and_say_on_what_they_stand(run, params):
    c, workdir, state, _ = run
    (kept,) = (workdir / "checkpoints").iterdir()
    size = sum(p.stat().st_size for p in (kept / "params").rglob("*") if p.is_file())
    assert size < 0.1 * sum(x.nbytes for x in jax.tree.leaves(params))
    base = bases.read(kept)
    assert base and base.path == c.checkpoint.init_from
    assert base.fingerprint == bases.fingerprint(params)
    assert bases.fingerprint(jax.tree.map(lambda x: x.copy(), params)) == base.fingerprint
    nudged = jax.tree.map(np.copy, params)
    leaf(nudged, KERNEL)[:2] = leaf(nudged, KERNEL)[1::-1]  # two rows change places
    assert bases.fingerprint(nudged) != base.fingerprint


def test_resume_is_exact_and_needs_the_same_base(run, params, tmp_path):
    c, workdir, _, _ = run
    whole, _ = tiny_run(c, params, 5, tmp_path / "whole")
    tiny_run(c, params, 3, tmp_path / "torn")
    resumed, _ = tiny_run(c, params, 2, tmp_path / "torn", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    other = jax.tree.map(lambda x: x + np.float32(1), params)
    weights.write(tmp_path / "other.safetensors", convert.to_reference(other))
    changed = config(
        checkpoint__init_from=str(tmp_path / "other.safetensors"),
        lora__also_train=("no_obj_ptr",),
    )
    with pytest.raises(UserError, match=r"other\.safetensors holds other weights .*base\.safet"):
        tiny_run(changed, params, 1, tmp_path / "torn", resume=True)


@pytest.mark.parametrize("ema", [False, True])
def test_loading_merges(run, params, ema):
    c, workdir, state, _ = run
    tree = train.best_params(state) if ema else state.params
    loaded = initial.load_init(workdir, jax.eval_shape(lambda: params), ema=ema)
    jax.tree.map(
        np.testing.assert_array_equal, loaded, jax.jit(lambda t: lora.merge(t, RULES))(tree)
    )
    assert initial.identify(initial.find_params(workdir)) == ("nano", "2.1")


def test_a_base_that_moved_is_asked_for(run, params, tmp_path):
    c, workdir, state, _ = run
    like = jax.eval_shape(lambda: params)
    here, there = pathlib.Path(c.checkpoint.init_from), tmp_path / "moved.safetensors"
    expected = initial.load_init(workdir, like)
    os.rename(here, there)
    try:
        with pytest.raises(UserError, match=r"--base=.*base\.safetensors does not exist"):
            initial.load_init(workdir, like)
        moved = initial.load_init(workdir, like, base=str(there))
        jax.tree.map(np.testing.assert_array_equal, moved, expected)
    finally:
        os.rename(there, here)
    with pytest.raises(UserError, match="--base=.* is for runs with lora.rules"):
        initial.load_init(here, like, base=str(here))
    with pytest.raises(UserError, match="has no moving average beside it"):
        initial.load_init(here, like, ema=True)
