"""Saving, resuming, starting from other weights, and what they refuse."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sam2_jax import checkpoint, convert, initial, sharding, weights
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError


def tree(value: float, width: int = 4) -> dict:
    return {"neck": {"kernel": jnp.full((3, width), value), "bias": jnp.full((width,), value)}}


def shapes(of: dict, fsdp: int = 1):
    mesh = sharding.make_mesh(-1, fsdp, 1)
    like = jax.eval_shape(lambda: of)
    return sharding.with_shardings(like, sharding.tree_shardings(like, mesh))


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints 2 and 4."""
    assert checkpoint.latest_step(tmp_path) is None
    manager = checkpoint.make_manager(tmp_path, checkpoint.Keep(2))
    for step in (2, 4):
        rest = {"step": jnp.int32(step), "moments": (tree(-step), ())}
        checkpoint.save(manager, step, tree(step), rest, {"batches": step, "clips": {"a": 3}})
        manager.wait_until_finished()
    manager.close()
    return tmp_path


def test_restores_state_and_position_in_the_data(saved):
    workdir = saved
    assert checkpoint.latest_step(workdir) == 4
    rest = shapes({"step": jnp.int32(0), "moments": (tree(0), ())}, fsdp=2)
    params, rest, data = checkpoint.restore(workdir, 4, shapes(tree(0), fsdp=2), rest)
    assert int(rest["step"]) == 4
    assert isinstance(rest["moments"], tuple)
    np.testing.assert_array_equal(params["neck"]["kernel"], np.full((3, 4), 4.0))
    np.testing.assert_array_equal(rest["moments"][0]["neck"]["bias"], np.full(4, -4.0))
    assert data == {"batches": 4, "clips": {"a": 3}}


def test_saved_values_survive_donation(tmp_path):
    # The next step overwrites the arrays while the checkpoint is still being written.
    manager = checkpoint.make_manager(tmp_path, checkpoint.Keep(3))
    bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {"w": jnp.zeros((512, 1024))}
    for step in (1, 2, 3):
        state = bump(state)
        checkpoint.save(manager, step, state, {"step": jnp.int32(step)}, {})
    state = bump(state)
    manager.wait_until_finished()
    manager.close()
    for step in (1, 2, 3):
        like = shapes({"w": jnp.zeros((512, 1024))})
        loaded = initial.load_init(tmp_path / "checkpoints" / str(step), like)
        np.testing.assert_array_equal(loaded["w"], np.full((512, 1024), float(step)))


@pytest.mark.parametrize(
    "part", ["", "checkpoints", "checkpoints/2", "checkpoints/2/params", "checkpoints/4"]
)
def test_init_takes_any_level(saved, part):
    workdir = saved
    params = initial.load_init(workdir / part, shapes(tree(0)))
    expected = 2.0 if "2" in part else 4.0
    np.testing.assert_array_equal(params["neck"]["bias"], np.full(4, expected))


def test_init_names_what_differs(saved):
    workdir = saved
    wanted = shapes({"neck": {"kernel": jnp.zeros((3, 5)), "scale": jnp.zeros(4)}})
    with pytest.raises(UserError) as error:
        initial.load_init(workdir, wanted)
    text = str(error.value)
    assert "'neck/kernel' is [3, 4], expected [3, 5]" in text
    assert "'neck/scale' is missing" in text
    assert "'neck/bias' is not expected" in text


def test_init_says_what_was_found(tmp_path):
    like = shapes(tree(0))
    with pytest.raises(UserError, match="does not exist"):
        initial.load_init(tmp_path / "nowhere", like)
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        initial.load_init(tmp_path / "cat.jpg", like)
    with pytest.raises(UserError, match=r"holds cat\.jpg"):
        initial.load_init(tmp_path, like)


def test_resume_refuses_other_arrays(saved):
    workdir = saved
    rest = shapes({"step": jnp.int32(0), "moments": (tree(0), ())})
    with pytest.raises(UserError, match="'neck/kernel' is"):
        checkpoint.restore(workdir, 4, shapes(tree(0, width=5)), rest)
    rest = shapes({"step": jnp.int32(0)})
    with pytest.raises(UserError, match=r"optim\.frozen: 1 -> 2.*is not expected"):
        checkpoint.restore(workdir, 4, shapes(tree(0)), rest, "optim.frozen: 1 -> 2")


@pytest.mark.parametrize("part", ["params", "optimizer"])
def test_resume_names_a_folder_that_is_missing(saved, part):
    workdir = saved
    shutil.rmtree(workdir / "checkpoints/4" / part)
    rest = shapes({"step": jnp.int32(0), "moments": (tree(0), ())})
    with pytest.raises(UserError, match=f"4/{part} cannot be restored .it is missing.*step 2"):
        checkpoint.restore(workdir, 4, shapes(tree(0)), rest)


@pytest.mark.parametrize("ending", weights.SUFFIXES)
def test_init_takes_files_of_weights(tmp_path, ending):
    if ending in weights.PICKLED:
        pytest.importorskip("torch")
    params = init_params(make_sam2("nano", 64), jax.random.key(0))
    path = tmp_path / f"official{ending}"
    weights.write(path, convert.to_reference(jax.device_get(params)))
    assert initial.find_params(path) == path
    like = shapes(params, fsdp=4)
    assert initial.check_init(path, like) == path
    loaded = initial.load_init(path, like)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    jax.tree.map(lambda x, y: pytest.fail() if x.sharding != y.sharding else None, loaded, like)
    older = shapes({k: x for k, x in params.items() if k != "no_obj_embed_spatial"})
    for check in (initial.check_init, initial.load_init):
        with pytest.raises(UserError, match=rf"official\{ending}: .*has not: no_obj_embed_spatial"):
            check(path, older)


def test_init_without_a_sharding_is_on_one_device(saved):
    loaded = initial.load_init(saved, jax.eval_shape(lambda: tree(0)))
    assert loaded["neck"]["bias"].sharding.device_set == {jax.devices()[0]}


def test_the_check_before_a_run_reads_no_values(tmp_path, saved, monkeypatch):
    params = jax.eval_shape(lambda: init_params(make_sam2("nano", 64), jax.random.key(0)))
    state = convert.hollow_reference(params)
    weights.write(tmp_path / "w.safetensors", state)
    monkeypatch.setattr(jax, "device_put", None)
    monkeypatch.setattr(ocp, "StandardCheckpointer", None)
    initial.check_init(tmp_path / "w.safetensors", params)
    initial.check_init(saved, shapes(tree(0)))
    with pytest.raises(UserError, match="'neck/bias' is"):
        initial.check_init(saved, shapes(tree(0, width=5)))


def test_folders_and_files_are_identified(tmp_path, saved):
    params = jax.eval_shape(lambda: init_params(make_sam2("nano", 64, "2.0"), jax.random.key(0)))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
    weights.write(tmp_path / "w.safetensors", convert.to_reference(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "folder", params)
    for name in ("w.safetensors", "folder"):
        assert initial.identify(tmp_path / name) == ("nano", "2.0")
    with pytest.raises(UserError, match="checkpoints/2/params: tensors that no SAM 2 has: neck/"):
        initial.identify(saved / "checkpoints/2/params")


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("Error writing local file: Disk quota exceeded [os_error_code='122']"),
    ],
)
def test_a_full_disk_at_the_end_is_one_sentence(saved, monkeypatch, error):
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", failing(error))
    with (
        pytest.raises(UserError, match=r"your quota or the disk is full\); .* is of step 4: make"),
        checkpoint.opened(saved, checkpoint.Keep(2)),
    ):
        pass


def test_what_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(checkpoint.Unwritten, match=r"curve could not be .* no checkpoint yet: make"),
        checkpoint.writing(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "curve"))
    with (
        pytest.raises(checkpoint.Unwritten, match=r"Read-only file system.* mend that, then start"),
        checkpoint.writing(tmp_path),
    ):
        raise OSError(errno.EROFS, "Read-only file system")
    with (
        pytest.raises(checkpoint.Unwritten, match=f"{tmp_path} could .* disk is full"),
        checkpoint.writing(tmp_path),
    ):
        raise RuntimeError("UNKNOWN: trace: No space left on device")
    with pytest.raises(RuntimeError, match="other"), checkpoint.writing(tmp_path):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("first", "warnings"), [(KeyError("bug"), 1), (checkpoint.Unwritten("full"), 0)]
)
def test_a_full_disk_at_the_end_does_not_hide_why(saved, monkeypatch, capsys, first, warnings):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", failing(full))
    with pytest.raises(type(first)) as raised, checkpoint.opened(saved, checkpoint.Keep(2)):
        raise first
    assert raised.value is first
    assert capsys.readouterr().err.count("warning: ") == warnings


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), ValueError("other")])
def test_what_else_fails_beside_an_open_manager_is_itself(saved, error):
    with pytest.raises(type(error)) as raised, checkpoint.opened(saved, checkpoint.Keep(2)):
        raise error
    assert raised.value is error


def test_the_settings_are_in_the_checkpoint(saved):
    settings = {"optim": {"frozen": ("a", "b")}, "seed": 3}
    with checkpoint.opened(saved, checkpoint.Keep(2)) as manager:
        checkpoint.save(manager, 6, tree(6), tree(6), {}, settings=settings)
    found = checkpoint.read_settings(saved, 6)
    assert found == {"optim": {"frozen": ["a", "b"]}, "seed": 3}
    assert checkpoint.read_settings(saved, 4) is None


def test_one_that_is_no_longer_kept_is_whole_until_it_is_out_of_sight(tmp_path, monkeypatch):
    trash = tmp_path / "checkpoints" / "deleted"
    with monkeypatch.context() as patch:  # killed before anything is deleted
        patch.setattr(checkpoint.shutil, "rmtree", lambda folder: None)
        with checkpoint.opened(tmp_path, checkpoint.Keep(1)) as manager:
            for step in (2, 4, 6):
                checkpoint.save(manager, step, tree(step), tree(step), {})
    assert checkpoint.steps_of(tmp_path) == [6]
    for step in (2, 4):
        params = initial.load_init(trash / str(step), shapes(tree(0)))
        np.testing.assert_array_equal(params["neck"]["kernel"], np.full((3, 4), float(step)))
    with checkpoint.opened(tmp_path, checkpoint.Keep(1)) as manager:
        assert not trash.exists()
        checkpoint.save(manager, 8, tree(8), tree(8), {})
        manager.wait_until_finished()
        checkpoint.save(manager, 10, tree(10), tree(10), {})
    assert checkpoint.steps_of(tmp_path) == [10] and not trash.exists()
