"""scripts/train.py around the loop, which is another one here: what is saved, and what fails."""

import errno
import json
import types
from typing import Any

import jax
import numpy as np
import pytest

from configs import smoke
from sam2_jax import checkpoint, loop, preparing, sharding, snapshot
from sam2_jax.types import UserError
from tests.test_loop import fit
from tests.test_train import ALONE, example, make_data, make_optimizer, setup
from tests.test_train_script import script  # noqa: F401


@pytest.fixture
def run_with(script, tmp_path, monkeypatch):  # noqa: F811
    """`train_on` with a loop of one's own, given state and hooks, after a skipped step."""
    state, _, like = setup(ALONE)
    state = state._replace(skipped=np.int32(1) + state.skipped)
    monkeypatch.setattr(script.eval_loss, "make_eval_loss", lambda *args: None)
    monkeypatch.setattr(script, "introduce", lambda *args: None)
    monkeypatch.setattr(script.recipe, "make_config_step", lambda *args: None)
    monkeypatch.setattr(script.train, "jit_step", lambda *args: None)
    monkeypatch.setattr(script.curves, "loss_curves", lambda *args: None)
    monkeypatch.setattr(preparing, "start", lambda *args: (state, "nowhere", None))
    run: Any = types.SimpleNamespace(
        workdir=tmp_path, latest=None, eval_sets=[], model=None, like=like, mesh=ALONE, parts=[0]
    )
    run.optimizer = make_optimizer()

    def start(own_loop, config):
        def run_loop(state, *args, hooks, **kwargs):
            own_loop(state, hooks)

        monkeypatch.setattr(loop, "run_loop", run_loop)
        script.train_on(config, run, make_data())

    return start


def test_a_checkpoint_knows_its_settings(run_with, tmp_path):
    config = smoke.get_config()
    run_with(lambda state, hooks: hooks.save(3, state), config)
    saved = checkpoint.read_settings(tmp_path, 3)
    assert saved == json.loads((tmp_path / "config.json").read_text())
    assert saved and saved["model"]["variant"] == "nano"


def test_only_what_writes_checkpoints_is_taken_for_them(run_with, monkeypatch):
    def connection_lost(state, hooks):
        raise ConnectionResetError("peer")

    with pytest.raises(ConnectionResetError):
        run_with(connection_lost, smoke.get_config())

    def no_quota(*args, **kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", no_quota)
    with pytest.raises(UserError, match="could not be written .*no checkpoint yet"):
        run_with(lambda state, hooks: hooks.save(3, state), smoke.get_config())


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def draw(state, hooks):
    hooks.save(3, state)


def bad_step(state, hooks):
    hooks.bad_step(4, state, example(0), {"skipped_in_a_row": 1.0})


@pytest.mark.parametrize(
    ("module", "what", "own_loop"),
    [
        ("resume", "write_config", lambda *_: None),
        ("curves", "loss_curves", draw),  # it is still being written
        ("curves", "loss_curves", lambda *_: None),  # at the end
        ("replay", "save", bad_step),
        ("judging", "judge", lambda _, hooks: hooks.judge(3, {})),
    ],
)
def test_whatever_finds_the_disk_full_says_so(
    run_with,
    script,  # noqa: F811
    tmp_path,
    monkeypatch,
    module,
    what,
    own_loop,  # noqa: F811
):
    monkeypatch.setattr(getattr(script, module), what, full)
    with pytest.raises(
        checkpoint.Unwritten, match=f"{tmp_path} could .* disk is full.; .*no checkpoint yet"
    ):
        run_with(own_loop, smoke.get_config())


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_is_stopped_says_it_is_saved_if_it_is(run_with, tmp_path, monkeypatch, fails):
    def stop(state, hooks):
        hooks.save(3, state)
        raise loop.Stopped(3)

    if fails:
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", full)
    with pytest.raises(checkpoint.Unwritten if fails else loop.Stopped):
        run_with(stop, smoke.get_config())


@pytest.mark.parametrize(("not_finite", "count"), [("stop", 0), ("skip", 1)])
def test_what_was_skipped_counts_where_steps_are_skipped(run_with, not_finite, count):
    config = smoke.get_config()
    config.train.not_finite = not_finite
    seen = []
    run_with(lambda state, hooks: seen.append(int(state.skipped)), config)
    assert seen == [count]


def test_a_run_that_stops_goes_on_from_one_that_skipped(tmp_path):
    """The checkpoint is of a step that was skipped."""
    mesh = sharding.make_mesh(2, 2, 1)
    fit(tmp_path, mesh, steps=4, bad=(4,), skip=2)
    _, step, like = setup(mesh)
    state, _ = snapshot.restore(tmp_path, 4, like, make_optimizer())
    assert int(state.skipped) == 1
    state = snapshot.count_anew(smoke.get_config(), state)
    layout = jax.tree.map(lambda x: x.sharding, (state.skipped, state.step))
    assert layout[0] == layout[1]
    kernel = np.asarray(state.params["image_encoder"]["kernel"])
    state, metrics = step(state, sharding.put_batch(example(5), mesh), jax.random.key(7))
    assert int(metrics["skipped_in_a_row"]) == 0 and int(state.step) == 5
    assert np.any(np.asarray(state.params["image_encoder"]["kernel"]) != kernel)
