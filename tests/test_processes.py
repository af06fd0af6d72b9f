"""A run of several real processes: the same numbers as one, and none outlives another's death."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from sam2_jax import checkpoint, cluster, stopping
from sam2_jax.types import UserError
from tests import processes

DEVICES = 2  # of a run, in one process or one in each; tests/meshes.py has more of both
STEPS = 8
SILENCE = 10  # seconds, of tests/peers.py
# nano on masks alone, which compiles fastest; batches of one video per device
SMALL = {
    "model.resolution": 32,
    "model.dropout": 0.1,  # drawn for the video, wherever it is
    "data.num_frames": 2,
    "data.max_objects": 1,
    "data.batch_size": DEVICES,
    "data.synthetic.eval_clips": 2,
    "data.synthetic.eval_frames": 3,
    "eval.loss_clips": 2,
    "prompts.prob_points": 0.0,
    "train.precision": "float32",
    "train.steps": STEPS,
    "train.log_every": 1,
    "checkpoint.every_steps": 3,
    "mesh.fsdp": 2,
}


def arguments(**changes) -> list[str]:
    given = SMALL | changes
    settings = [f"--config.{key}={value}" for key, value in given.items()]
    return ["--config=configs/smoke.py", *settings]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    """Rows of one process with all devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    processes.run(workdir, 1, DEVICES, arguments())
    return processes.rows(workdir)


def assert_same(rows: list[dict], others: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


def end_of(log: pathlib.Path) -> str:
    return log.read_text()[-3000:]


def test_two_processes_are_as_good_as_one_and_end_and_go_on_together(alone, tmp_path):
    """One is killed: the other ends at once. Both started again come to where one alone did."""
    workdir = tmp_path / "run"
    survivor, killed = processes.start(workdir, 2, DEVICES // 2, arguments())
    while not checkpoint.steps_of(workdir) and survivor.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    began = time.monotonic()
    status = survivor.wait(2 * cluster.SILENCE)
    log = end_of(processes.log_of(workdir, 0))
    assert status not in {0, 2}, log  # to be started again, by the scripts that launch
    assert time.monotonic() - began < cluster.SILENCE
    assert "process 0 of 2 ends here" in log
    assert 3 <= len(processes.rows(workdir)) < STEPS
    processes.run(workdir, 2, DEVICES // 2, arguments())
    assert_same(processes.rows(workdir), alone)
    again = processes.log_of(workdir, 0).read_text()
    assert re.search(r"^ +start +checkpoint of step", again, re.MULTILINE)


def wait_for(process: subprocess.Popen, happened) -> None:
    while not happened():
        assert process.poll() is None
        time.sleep(0.02)


def test_a_scheduler_that_asks_all_processes_of_a_run_to_end(tmp_path):
    """Before the first step there is nothing to save; tests/kills.py has what comes later."""
    workdir = tmp_path / "run"
    given = arguments(**{"data.workers": 1})
    process = processes.start(workdir, 1, DEVICES, given, start_new_session=True)[0]
    wait_for(process, lambda: workdir.exists())
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == stopping.STOPPED
    said = processes.log_of(workdir, 0).read_text()
    assert "asked to end (SIGTERM) before the first step" in said


def test_processes_that_disagree_stop_before_anything(tmp_path):
    workdir = tmp_path / "run"
    address = f"localhost:{processes.free_port()}"
    started = [
        processes.start_one(workdir, i, 2, 1, address, arguments(seed=seed))
        for i, seed in enumerate((3, 4))
    ]
    assert [process.wait(120) for process in started] == [2, 2]
    said = end_of(processes.log_of(workdir, 0))
    assert "process 1 has seed=4 where process 0 has seed=3" in said
    assert not workdir.exists()


def test_a_setting_that_cannot_be_in_one_process_ends_all(tmp_path):
    workdir = tmp_path / "run"
    address = f"localhost:{processes.free_port()}"
    started = [
        processes.start_one(workdir, i, 2, 1, address, arguments(**{"train.precision": precision}))
        for i, precision in enumerate(("float32", "float16"))
    ]
    first, second = [process.wait(cluster.SILENCE) for process in started]
    assert (first != 0, second) == (True, 2)
    logs = [end_of(processes.log_of(workdir, i)) for i in range(2)]
    assert f"waiting for the others at {address}" in logs[0]
    assert "error: train.precision" in logs[1]
    assert not workdir.exists()


@pytest.fixture
def peers(tmp_path):
    """Two processes of tests/peers.py, both under way, and where each prints its steps."""
    address = f"localhost:{processes.free_port()}"
    started = []
    for i in range(2):
        command = [sys.executable, "-m", "tests.peers", address, "2", str(i), str(SILENCE)]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        with (tmp_path / f"{i}.log").open("w") as log, (tmp_path / f"{i}.err").open("w") as err:
            started.append(
                subprocess.Popen(command, cwd=processes.ROOT, env=env, stdout=log, stderr=err)
            )
    while any(not steps_of(tmp_path / f"{i}.log") for i in range(2)):
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)
    yield started, [tmp_path / f"{i}.log" for i in range(2)]
    for process in started:
        process.kill()
        process.wait()


def steps_of(log: pathlib.Path) -> list[int]:
    whole = log.read_text().split("\n")[:-1]
    return [int(line) for line in whole if line.isdigit()]


@pytest.mark.parametrize("asked", [0, 1])
def test_where_one_is_asked_to_stop_all_stop_after_the_same_step(peers, asked):
    started, logs = peers
    started[asked].send_signal(signal.SIGTERM)
    assert [process.wait(cluster.SILENCE) for process in started] == [stopping.STOPPED] * 2
    assert steps_of(logs[0]) == steps_of(logs[1])


@pytest.mark.parametrize("killed", [0, 1])
def test_whichever_is_killed_the_other_ends(peers, killed):
    """The first one is the one that JAX's service of all runs in."""
    started, _ = peers
    started[killed].kill()
    assert started[1 - killed].wait(cluster.SILENCE) not in {0, 2}


@pytest.mark.parametrize("frozen", [0, 1])
def test_whichever_falls_silent_the_other_ends(peers, frozen):
    """No connection breaks: without heartbeats a collective would wait for ever, as on devices."""
    started, logs = peers
    started[frozen].send_signal(signal.SIGSTOP)
    assert started[1 - frozen].wait(4 * SILENCE) == -signal.SIGABRT  # 134 of a shell
    said = logs[1 - frozen].with_suffix(".err").read_text()
    assert "Terminating process because the JAX distributed service detected fatal errors" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost", 2, 0), "--coordinator_address=localhost is not HOST:PORT"),
        (("localhost:1", 0, 0), "--num_processes=0 must be at least 1"),
        (("localhost:1", 2, 2), "--process_id=2 is not one of --num_processes=2: expected 0 to 1"),
        (("localhost:1", 2, -1), "--process_id=-1 is not one of"),
        (("localhost:1", 2, None), "needs --num_processes and --process_id"),
    ],
)
def test_what_cannot_be_joined_is_said_at_once(given, words):
    with pytest.raises(UserError, match=words):
        cluster.connect(*given)
