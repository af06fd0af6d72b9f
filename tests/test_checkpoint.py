"""Saving, resuming, starting from other weights, and what they refuse."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import checkpoint, sharding
from sam2_jax.types import UserError


def tree(value: float, width: int = 4) -> dict:
    return {"neck": {"kernel": jnp.full((3, width), value), "bias": jnp.full((width,), value)}}


def shapes(of: dict, fsdp: int = 1):
    mesh = sharding.make_mesh(-1, fsdp, 1)
    like = jax.eval_shape(lambda: of)
    return sharding.with_shardings(like, sharding.tree_shardings(like, mesh))


def iterator():
    data = grain.MapDataset.range(100).seed(3).shuffle().repeat().map(np.asarray)
    return iter(data.to_iter_dataset(grain.ReadOptions(1, 1)))


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints 2 and 4, and the next elements of the data after each."""
    assert checkpoint.latest_step(tmp_path) is None
    manager = checkpoint.make_manager(tmp_path, keep=2)
    data = iterator()
    following = {}
    for step in (1, 2, 3, 4):
        next(data)
        if step in (2, 4):
            rest = {"step": jnp.int32(step), "moments": (tree(-step), ())}
            checkpoint.save(manager, step, tree(step), rest, data)
            manager.wait_until_finished()
    following[4] = int(next(data))
    manager.close()
    return tmp_path, following


def test_restores_state_and_position_in_the_data(saved):
    workdir, following = saved
    assert checkpoint.latest_step(workdir) == 4
    data = iterator()
    rest = shapes({"step": jnp.int32(0), "moments": (tree(0), ())}, fsdp=2)
    params, rest = checkpoint.restore(workdir, 4, shapes(tree(0), fsdp=2), rest, data)
    assert int(rest["step"]) == 4
    assert isinstance(rest["moments"], tuple)
    np.testing.assert_array_equal(params["neck"]["kernel"], np.full((3, 4), 4.0))
    np.testing.assert_array_equal(rest["moments"][0]["neck"]["bias"], np.full(4, -4.0))
    assert int(next(data)) == following[4]


def test_saved_values_survive_donation(tmp_path):
    # The next step overwrites the arrays while the checkpoint is still being written.
    manager = checkpoint.make_manager(tmp_path, keep=3)
    bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {"w": jnp.zeros((512, 1024))}
    for step in (1, 2, 3):
        state = bump(state)
        checkpoint.save(manager, step, state, {"step": jnp.int32(step)}, iterator())
    state = bump(state)
    manager.wait_until_finished()
    manager.close()
    for step in (1, 2, 3):
        like = shapes({"w": jnp.zeros((512, 1024))})
        loaded = checkpoint.load_init(tmp_path / "checkpoints" / str(step), like)
        np.testing.assert_array_equal(loaded["w"], np.full((512, 1024), float(step)))


@pytest.mark.parametrize(
    "part", ["", "checkpoints", "checkpoints/2", "checkpoints/2/params", "checkpoints/4"]
)
def test_init_takes_any_level(saved, part):
    workdir, _ = saved
    params = checkpoint.load_init(workdir / part, shapes(tree(0)))
    expected = 2.0 if "2" in part else 4.0
    np.testing.assert_array_equal(params["neck"]["bias"], np.full(4, expected))


def test_init_names_what_differs(saved):
    workdir, _ = saved
    wanted = shapes({"neck": {"kernel": jnp.zeros((3, 5)), "scale": jnp.zeros(4)}})
    with pytest.raises(UserError) as error:
        checkpoint.load_init(workdir, wanted)
    text = str(error.value)
    assert "'neck/kernel' is [3, 4], expected [3, 5]" in text
    assert "'neck/scale' is missing" in text
    assert "'neck/bias' is not expected" in text


def test_init_says_what_was_found(tmp_path):
    like = shapes(tree(0))
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load_init(tmp_path / "nowhere", like)
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        checkpoint.load_init(tmp_path / "cat.jpg", like)
    with pytest.raises(UserError, match=r"holds cat\.jpg"):
        checkpoint.load_init(tmp_path, like)


def test_resume_refuses_another_model(saved):
    workdir, _ = saved
    model = {"variant": "tiny", "version": "2.1", "resolution": 512, "dropout": 0.1}
    (workdir / "config.json").write_text(json.dumps({"model": model}))
    checkpoint.check_same_model(workdir, {"model": model | {"dropout": 0.0}})
    with pytest.raises(UserError, match="model.variant was 'tiny', is now 'small'"):
        checkpoint.check_same_model(workdir, {"model": model | {"variant": "small"}})


def test_resume_refuses_other_arrays(saved):
    workdir, _ = saved
    rest = shapes({"step": jnp.int32(0), "moments": (tree(0), ())})
    with pytest.raises(UserError, match="'neck/kernel' is"):
        checkpoint.restore(workdir, 4, shapes(tree(0, width=5)), rest, iterator())
    rest = shapes({"step": jnp.int32(0)})
    with pytest.raises(UserError, match=r"optimizer .*is not expected"):
        checkpoint.restore(workdir, 4, shapes(tree(0)), rest, iterator())


def test_changed_keys(tmp_path):
    (tmp_path / "config.json").write_text('{"train": {"steps": 5}, "optim": {"frozen": ["a"]}}')
    flat = {"train.steps": 6, "optim.frozen": ("a",)}
    assert checkpoint.changed_keys(tmp_path, flat) == ["train.steps: 5 -> 6"]
