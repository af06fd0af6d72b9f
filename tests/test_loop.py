"""The loop on a model of two matrices: exact resume, what is kept, being stopped, bad steps."""

import functools
import json
import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import (
    checkpoint,
    judging,
    loop,
    progress,
    replay,
    reports,
    sharding,
    snapshot,
    stopping,
    train,
)
from sam2_jax.types import UserError
from tests.test_train import make_data, make_optimizer, setup

SETTINGS = {"train": {"precision": "float32", "not_finite": "stop"}}
KEEP = checkpoint.Keep(last=2)


class Killed(Exception):
    """Stands for a run that is killed."""


class Spoiled:
    """The data, with batches that divide by no object at some positions."""

    def __init__(self, bad):
        self.data, self.bad = make_data(), bad

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.data)
        if self.data.get_state()["batches"] in self.bad:
            return batch._replace(valid=np.zeros_like(batch.valid))
        return batch


def fit(
    workdir: pathlib.Path,
    mesh,
    steps=10,
    kill_at=0,
    stop_at=0,
    bad=(),
    skip=0,
    ema_decay=0.0,
    keep=KEEP,
    **settings,
):
    """A run as scripts/train.py does it, killed at the start of the evaluation of `kill_at`."""
    state, step, like = setup(mesh, ema_decay=ema_decay, skip=skip > 0)
    optimizer, source = make_optimizer(), Spoiled(bad)
    latest = checkpoint.latest_step(workdir)
    if latest is not None:
        state, position = snapshot.restore(workdir, latest, like, optimizer)
        source.data.set_state(position)
    manager = checkpoint.make_manager(workdir, keep)

    def save(n, now):
        snapshot.save(manager, n, now, optimizer, source.data.get_state())

    def evaluate(now, n):
        if n == kill_at:
            raise Killed
        return {"eval/J&F": float(now.params["memory_attention"]["kernel"].sum())}

    def bad_step(n, now, batch, values):
        clips = source.data.clips_of(n - 1)
        checkpoint.finish(manager)  # else the error may name the checkpoint before it
        return replay.save(workdir, n, now, batch, values, clips, ["--x=1"], SETTINGS)

    chosen: dict[str, Any] = {
        "log_every": 2,
        "eval_every": 3,
        "save_every": 4,
        "max_skipped": skip,
    } | settings
    try:
        return loop.run_loop(
            state,
            step,
            source,
            jax.random.key(7),
            loop.LoopSettings(steps, **chosen),
            mesh,
            workdir=workdir,
            hooks=loop.Hooks(
                save,
                evaluate,
                functools.partial(judging.judge, manager) if keep.best else None,
                clips_of=source.data.clips_of,
                should_stop=lambda n: n == stop_at,
                bad_step=bad_step,
            ),
        )
    finally:
        manager.wait_until_finished()
        manager.close()


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in progress.MACHINE} for line in lines
    ]


def kept(workdir):
    folders = (p.name for p in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in folders if name != checkpoint.TRASH)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    mesh = sharding.make_mesh(2, 2, 1)
    whole = fit(tmp_path / "whole", mesh, ema_decay=0.9)
    with pytest.raises(Killed):
        fit(tmp_path / "torn", mesh, kill_at=6, ema_decay=0.9)
    assert [r["step"] for r in rows(tmp_path / "torn")][-1] == 6  # later than checkpoint 4
    with (tmp_path / "torn/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = fit(tmp_path / "torn", mesh, ema_decay=0.9)
    assert resumed.ema is not None
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")


def test_an_average_that_a_checkpoint_lacks_begins_as_a_copy(tmp_path):
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    state, _, like = setup(mesh)
    optimizer = make_optimizer()
    with checkpoint.make_manager(tmp_path, checkpoint.Keep(1)) as manager:
        snapshot.save(manager, 3, state._replace(step=jnp.int32(3)), optimizer, {})
    restored, _ = snapshot.restore(tmp_path, 3, like, optimizer)
    assert restored.step == 3 and restored.ema is None
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    average = train.split_params(like.params, optimizer)[0]
    restored, _ = snapshot.restore(tmp_path, 3, like._replace(ema=average), optimizer)
    copy = train.begin_ema(state.params, optimizer)
    jax.tree.map(np.testing.assert_array_equal, restored.ema, copy)


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_asked_to_end_saves_and_goes_on(tmp_path, step):
    mesh = sharding.make_mesh(4, 1, 1)
    whole = fit(tmp_path / "whole", mesh)
    with pytest.raises(loop.Stopped) as stopped:
        fit(tmp_path / "cut", mesh, stop_at=step)
    assert stopped.value.step == step and kept(tmp_path / "cut")[-1] == step
    resumed = fit(tmp_path / "cut", mesh)  # at 6 an evaluation was due, and is made up for
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_rows_and_checkpoints(tmp_path):
    fit(tmp_path, sharding.make_mesh(4, 1, 1))
    table = rows(tmp_path)
    logged = [r["step"] for r in table if "loss" in r]
    assert logged == [1, 2, 4, 6, 8, 10]  # first, every second, last
    assert [r["step"] for r in table if "eval/J&F" in r] == [3, 6, 9, 10]
    plain = {k for k in table[0] if not k.startswith(("grad_norm/", "update_norm/"))}
    assert plain == {
        *("step", "loss", "loss_mask", "grad_norm", "update_norm", "learning_rate"),
        *("skipped_in_a_row", "passes"),
    }
    assert np.float32(table[0]["learning_rate"]) == np.float32(1e-2)
    whole = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert whole[1]["videos_per_second"] == pytest.approx(4 * whole[1]["steps_per_second"])
    assert whole[1]["frames_per_second"] == pytest.approx(3 * whole[1]["videos_per_second"])
    assert 0 <= whole[1]["data_wait"] <= 1
    assert kept(tmp_path) == [9, 10]
    assert list((tmp_path / "tensorboard").glob("events*"))
    worst = json.loads((tmp_path / "worst.json").read_text())
    first, second = worst["worst"][:2]
    assert len(worst["worst"]) == 10 and first["times_the_usual"] >= second["times_the_usual"]
    assert first["clips"] == [f"clip{first['step'] - 1}"]


def test_the_best_and_every_so_many_are_kept_too(tmp_path):
    keep = checkpoint.Keep(last=1, every=4, best=1)
    fit(tmp_path, sharding.make_mesh(4, 1, 1), keep=keep)
    found = {r["step"]: r["eval/J&F"] for r in rows(tmp_path) if "eval/J&F" in r}
    best = max(found, key=lambda step: found[step])
    assert best == 10
    # That of step 9 was the best when step 10 was saved, before it was evaluated
    assert kept(tmp_path) == [4, 8, 9, 10]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == best


def test_a_step_that_is_not_finite_ends_the_run_and_can_be_repeated(tmp_path):
    mesh = sharding.make_mesh(4, 1, 1)
    with pytest.raises(
        UserError, match=r"step 7 is not finite \(loss_mask.*clip6.*--replay=.* step 6"
    ):
        fit(tmp_path, mesh, bad=(7,))
    assert kept(tmp_path) == [4, 6]
    assert rows(tmp_path)[-1]["step"] == 6
    path = tmp_path / "bad/7/report.json"
    report = reports.read_report(path)
    assert report["step"] == 7 and report["clips"] == ["clip6"] and report["command"] == ["--x=1"]
    assert report["settings"] == SETTINGS
    assert report["values"]["loss"] is None and "loss_mask" in report["not_finite"]
    _, step, like = setup(mesh)
    for loops in (False, True):
        with pytest.raises(FloatingPointError):
            replay.repeat(path, step, like, mesh, jax.random.key(7), loops)


def test_the_step_repeated_is_that_very_step(tmp_path):
    mesh = sharding.make_mesh(4, 1, 1)
    fit(tmp_path / "fine", mesh, steps=7)
    with pytest.raises(UserError):
        fit(tmp_path / "bad", mesh, bad=(7,))
    path = tmp_path / "bad/bad/7/report.json"
    data = make_data()
    data.set_state({"batches": 6, "clips": {"train": 1000}})
    good = next(data)
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in good._asdict().items()}
    np.savez(path.parent / "batch-0.npz", **arrays)
    _, step, like = setup(mesh)
    again = replay.repeat(path, step, like, mesh, jax.random.key(7))
    assert np.float32(again["loss"]) == np.float32(rows(tmp_path / "fine")[-2]["loss"])


def test_bad_steps_are_skipped_if_asked_for_up_to_a_number(tmp_path, capsys):
    mesh = sharding.make_mesh(4, 1, 1)
    fit(tmp_path / "some", mesh, bad=(3, 6, 7), skip=2, log_every=100)
    found = [r for r in rows(tmp_path / "some") if "loss" in r]
    skipped = [(r["step"], r["skipped_in_a_row"], r["skipped"]) for r in found]
    assert skipped == [(1, 0, 0), (3, 1, 1), (6, 1, 2), (7, 2, 3), (10, 0, 3)]
    worst = json.loads((tmp_path / "some/worst.json").read_text())["worst"]
    assert [row["step"] for row in worst[:3]] == [7, 6, 3] and worst[0]["loss"] is None
    assert "step 6 is not finite and skipped: clip5" in capsys.readouterr().out
    with pytest.raises(UserError, match="step 7 is not finite"):
        fit(tmp_path / "many", mesh, bad=(5, 6, 7), skip=2)


@pytest.mark.parametrize("text", ["", "{}", '{"step": "x", "command": []}'])
def test_a_report_that_is_none(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"--replay=.*r\.json is no report"):
        reports.read_report(tmp_path / "r.json")


def test_a_trace_of_some_steps(tmp_path):
    fit(tmp_path, sharding.make_mesh(4, 1, 1), steps=4, profile_steps=(2, 3))
    assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    fit(tmp_path, sharding.make_mesh(4, 1, 1), steps=4)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with (
        pytest.raises(UserError, match=r"disk is full\); .* checkpoint is of step 4"),
        checkpoint.writing(tmp_path),
    ):
        fit(tmp_path, sharding.make_mesh(4, 1, 1), steps=8)


def test_two_runs_do_not_share_a_workdir(tmp_path):
    held = stopping.take(tmp_path / "new")
    assert held
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        stopping.take(tmp_path / "new")
    held.close()
    again = stopping.take(tmp_path / "new")
    assert again
    again.close()


def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", forbidden)
    with pytest.raises(UserError, match="cannot be written to .Permission denied"):
        stopping.take(tmp_path)


def test_signals_are_noted_and_the_second_one_ends():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        request = stopping.Request()
        assert not request(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request(2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
