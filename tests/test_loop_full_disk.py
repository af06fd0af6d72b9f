"""The loop on a disk that is full: one sentence, nothing saved is lost, the first error stays."""

import errno
import os

import jax
import numpy as np
import pytest

from sam2_jax import checkpoint, loop, records, sharding
from sam2_jax.types import UserError
from tests.test_loop import Killed, fit, rows

MESH = sharding.make_mesh(4, 1, 1)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


close = records.Records.close


def full_at_the_end(self):
    close(self)
    full()


def full_after(steps: int, call):
    """`call` of an object of Records, which finds the disk full once rows of so many are there."""

    def fails(self, *args):
        if any(row["step"] >= steps for row in records.whole_rows(self.path)):
            full()
        return call(self, *args)

    return fails


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to: its last state and its rows."""
    workdir = tmp_path_factory.mktemp("whole")
    return fit(workdir, MESH), rows(workdir)


@pytest.mark.parametrize(
    ("what", "saved"),
    [
        ("write", 9),  # of the evaluation of step 9, the first after row 8
        ("best", 9),
        ("sync", 6),
    ],
)
def test_a_run_goes_on_from_where_the_disk_was_full(
    tmp_path, whole, monkeypatch, capsys, what, saved
):
    manager = checkpoint.ocp.CheckpointManager
    save = manager.save

    def save_and_wait(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait_until_finished()

    monkeypatch.setattr(manager, "save", save_and_wait)
    with monkeypatch.context() as patched:
        patched.setattr(records.Records, what, full_after(8, getattr(records.Records, what)))
        words = f"disk is full.; the last whole checkpoint is of step {saved}: make room"
        with pytest.raises(checkpoint.Unwritten, match=words):
            fit(tmp_path, MESH)
    assert "warning" not in capsys.readouterr().err
    resumed = fit(tmp_path, MESH)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole[0])
    assert rows(tmp_path) == whole[1]


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage

    def full_after_one(path):
        full = checkpoint.latest_step(tmp_path) is not None
        return usage(path)._replace(free=0 if full else 2**40)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full_after_one)
    words = r"disk is full: a checkpoint takes .* MiB, 0\.0 MiB are left\); the last whole"
    with pytest.raises(checkpoint.Unwritten, match=words):
        with checkpoint.writing(tmp_path):  # as scripts/train.py saves
            fit(tmp_path, MESH)
    step = checkpoint.latest_step(tmp_path)
    begun = [p.name for p in (tmp_path / checkpoint.CHECKPOINTS).iterdir()]
    assert step is not None and max(map(int, begun)) == step


@pytest.mark.parametrize(("what", "fails"), [("__init__", full), ("close", full_at_the_end)])
def test_the_beginning_and_the_end(tmp_path, monkeypatch, what, fails):
    monkeypatch.setattr(records.Records, what, fails)
    with pytest.raises(checkpoint.Unwritten, match="disk is full"):
        fit(tmp_path, MESH, steps=2)


def test_what_fails_at_the_end_does_not_hide_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records.Records, "close", full_at_the_end)
    with pytest.raises(Killed):
        fit(tmp_path, MESH, kill_at=6)
    assert capsys.readouterr().err.count("warning: ") == 1
    with pytest.raises(UserError, match="step 8 is not finite"):
        fit(tmp_path, MESH, bad=(8,))
    assert capsys.readouterr().err.count("warning: ") == 1
    with pytest.raises(loop.Stopped):
        fit(tmp_path, MESH, stop_at=8)
    assert checkpoint.latest_step(tmp_path) == 8


def test_all_is_closed_whatever_fails(tmp_path, monkeypatch, capsys):
    closed = []
    monkeypatch.setattr(records.Records, "close", lambda self: closed.append(close(self)))
    monkeypatch.setattr(records.Records, "worst", full)
    with pytest.raises(UserError, match="step 1 is not finite.*there is no checkpoint yet"):
        fit(tmp_path, MESH, bad=(1,))
    assert len(closed) == 1
    assert capsys.readouterr().err.count("warning: ") == 1


def test_a_trace_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def stop():
        stop_trace()
        raise RuntimeError("UNKNOWN: events.xplane.pb; No space left on device")

    stop_trace = jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    with pytest.raises(checkpoint.Unwritten, match="disk is full"):
        fit(tmp_path, MESH, steps=4, profile_steps=(2, 3))
    assert "warning" not in capsys.readouterr().err


def test_checkpoints_that_cannot_be_written_are_told_of_at_the_start(tmp_path):
    folder = tmp_path / checkpoint.CHECKPOINTS
    folder.mkdir()
    (folder / checkpoint.TRASH).touch()  # root may write to folders that are read-only
    with pytest.raises(checkpoint.Unwritten, match="could not be written .*File exists.* no check"):
        with checkpoint.opened(tmp_path, checkpoint.Keep(1)):
            pytest.fail("it is open")
