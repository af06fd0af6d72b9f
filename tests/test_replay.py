"""A step that was not finite, saved and repeated: by several processes, and as it really was."""

import contextlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sam2_jax import arrays, config, replay, reports, sharding, snapshot
from sam2_jax.types import UserError
from sam2_jax.updates import UpdateState
from tests import processes, replaying
from tests.test_loop import fit
from tests.test_train import ALONE, BATCH, example, make_optimizer, setup


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What two processes with a device each saved, and repeated."""
    folder = tmp_path_factory.mktemp("two")
    address = f"localhost:{processes.free_port()}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "tests.replaying", str(folder), address, "2"]
    with contextlib.ExitStack() as stack:
        started = []
        for i in range(2):
            process = subprocess.Popen(
                [*command, str(i)],
                cwd=processes.ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.append(stack.enter_context(process))
            stack.callback(process.kill)  # called first, then the process is waited for
        said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return folder


def report_of(folder):
    return folder / f"bad/{replaying.STEP}/report.json"


@pytest.mark.parametrize("loops", [False, True])
def test_what_two_processes_saved_is_repeated_by_one(saved, loops):
    mesh = sharding.make_mesh(2, 1, 1, jax.devices()[:2])
    _, step, like = setup(mesh)
    key = jax.random.key(replaying.KEY)
    again = replay.repeat(report_of(saved), step, like, mesh, key, loops)
    values = json.loads((saved / "loss.json").read_text())
    assert again["loss"] == pytest.approx(values["loss"], rel=1e-5)
    batch = replay.read_batch(report_of(saved))
    jax.tree.map(np.testing.assert_array_equal, batch, example(replaying.STEP))


def test_rows_are_put_together_whoever_has_them(saved, tmp_path):
    """Here process 0 has the last ones, as may be on a torus."""
    (tmp_path / "report.json").write_text(report_of(saved).read_text())
    whole = example(replaying.STEP)._asdict()
    for i, rows in enumerate((np.arange(1, BATCH), np.arange(1))):
        mine = {name: value[rows] for name, value in whole.items()}
        np.savez(tmp_path / f"batch-{i}.npz", rows=rows, **mine)
    found = replay.read_batch(tmp_path / "report.json")
    jax.tree.map(np.testing.assert_array_equal, found._asdict(), whole)
    (tmp_path / "batch-1.npz").unlink()
    with pytest.raises(UserError, match=r"batch-1\.npz beside it cannot be read.*2 processes"):
        replay.read_batch(tmp_path / "report.json")


def test_a_report_says_who_can_repeat_it(saved):
    path = report_of(saved)
    report = reports.read_report(path)
    assert report["processes"] == 2 and report["exact"]
    assert [reports.processes_of(path, report, now) for now in (1, 2)] == [2, 2]
    with pytest.raises(UserError, match=r"run of 2 processes, this one has 3: .* or on 2"):
        reports.processes_of(path, report, 3)
    with pytest.raises(UserError, match=r"run of 1 process, this one has 2: .*num_processes$"):
        reports.processes_of(path, {}, 2)


def test_a_report_is_repeated_from_any_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/own.py").touch()
    report = {"step": 1, "command": ["--config=own.py:tiny", "--workdir=x"], "settings": {}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report | {"folder": str(tmp_path / "run")}))
    monkeypatch.chdir(tmp_path)
    assert config.replay_command(path) == report["command"]
    assert (
        os.getcwd() == str(tmp_path / "run") and "note: as that run in" in capsys.readouterr().err
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").touch()  # here is one, too
    assert config.replay_command(path) == report["command"]
    assert os.getcwd() == str(tmp_path) and not capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["--a=1", "--process_id=3", "--b"],
        ["--a=1", "--coordinator_address", "host:1", "--b", "-num_processes=2"],
        ["--process_id", "0", "--a=1", "--b", "--num_processes", "2"],
    ],
)
def test_the_command_of_a_report_is_that_of_any_process(saved, command):
    assert replay.without_places(command) == ["--a=1", "--b"]
    assert reports.read_report(report_of(saved))["command"] == ["--x=1"]


@pytest.mark.parametrize(
    ("bad", "skip"),
    [
        ((7,), 0),  # known once step 8 is launched
        ((8,), 0),  # known at once: its checkpoint is due
        ((5, 6, 7, 8), 2),
        ((6, 7, 8), 2),
    ],
)
def test_the_state_saved_is_the_one_before(tmp_path, bad, skip):
    mesh = sharding.make_mesh(2, 2, 1)
    step = bad[skip]
    fit(tmp_path / "fine", mesh, steps=step - 1, bad=bad[:skip], skip=skip, ema_decay=0.9)
    with pytest.raises(UserError, match=f"step {step} is not finite"):
        fit(tmp_path / "bad", mesh, bad=bad, skip=skip, ema_decay=0.9)
    _, _, like = setup(mesh, ema_decay=0.9)
    before, _ = snapshot.restore(tmp_path / "fine", step - 1, like, make_optimizer())
    folder = tmp_path / f"bad/bad/{step}"
    found = arrays.read(folder / replay.STATE, like._asdict())
    jax.tree.map(np.testing.assert_array_equal, found, before._asdict())
    assert reports.read_report(folder / replay.REPORT)["exact"]


def test_a_state_that_has_gone_on_is_said_to_have():
    """The step after the bad one was finite, and run before that was known."""
    state, step, _ = setup(ALONE, skip=True)
    broken = example(0)._replace(valid=np.zeros((BATCH, 2), bool))  # divides by no object
    for batch, exact in ((example(0), None), (broken, True), (example(1), False)):
        state, _ = step(state, batch, jax.random.key(0))
        if exact is not None:
            before, is_that = replay.state_before(state, 2, 1)
            assert is_that is exact
            assert (int(before.step), int(before.skipped)) == (1, 0)
            groups = [x for x in leaves(before.opt_state) if isinstance(x, UpdateState)]
            assert groups and all(int(x.step) == 1 for x in groups)


def leaves(opt_state):
    return jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, UpdateState))
