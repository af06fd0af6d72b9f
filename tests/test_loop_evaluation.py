"""The loop around an evaluation: what is saved before it, made up for after it, kept by it."""

import json
import math

import jax
import numpy as np
import pytest

from sam2_jax import arrays, checkpoint, loop, records, reports, sharding, stopping
from sam2_jax.types import UserError
from tests.test_loop import Killed, fit, kept, rows
from tests.test_train import setup

MESH = sharding.make_mesh(4, 1, 1)
KEEP = checkpoint.Keep(last=4, best=1)


def figures(workdir, step):
    path = workdir / f"checkpoints/{step}/metrics/metrics"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("step", [6, 10])
def test_an_evaluation_that_dies_is_made_up_for(tmp_path, step):
    fit(tmp_path / "whole", MESH, keep=KEEP)
    with pytest.raises(Killed):
        fit(tmp_path / "torn", MESH, keep=KEEP, kill_at=step)
    assert kept(tmp_path / "torn")[-1] == step and figures(tmp_path / "torn", step) is None
    fit(tmp_path / "torn", MESH, keep=KEEP)
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")
    assert figures(tmp_path / "torn", step) == figures(tmp_path / "whole", step)
    assert figures(tmp_path / "torn", step) is not None


def test_an_evaluation_is_left_for_a_request(tmp_path, monkeypatch):
    def leave(*args):
        raise stopping.Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("tests.test_loop.Killed", stopping.Interrupted)
        with pytest.raises(loop.Stopped, match="after step 6, which is saved"):
            fit(tmp_path, MESH, kill_at=6)
    assert kept(tmp_path)[-1] == 6
    assert rows(tmp_path)[-1]["step"] == 6 and "loss" in rows(tmp_path)[-1]


def test_a_request_is_noticed_by_who_asks():
    request = stopping.Request.__new__(stopping.Request)
    request._asked = False
    request.check()
    request._asked = True
    with pytest.raises(stopping.Interrupted):
        request.check()


def test_the_worst_batches():
    """A high loss of the beginning is none; a plan of many passes has a high one by nature."""
    worst = loop.Worst()
    losses = [99.0, *[2.0] * loop.ENOUGH, math.nan, *[1.0] * 2 * loop.RECENT, 8.0]
    for step, loss in enumerate(losses, 1):
        passes = 5.0 if step % 2 else 1.0
        worst.see(step, loss * passes, passes, [f"clip{step}"])
    assert len(worst.seen.rows) == records.WORST
    assert [(times, step) for times, step, *_ in worst.seen.rows[:3]] == [
        (math.inf, loop.ENOUGH + 2),
        (8.0, len(losses)),
        (1.0, worst.seen.rows[2][1]),
    ]
    assert len(worst.seen.recent) == 2 * loop.RECENT


def test_a_spike_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "ENOUGH", 2)
    monkeypatch.setattr(loop, "SPIKE", 0.5)
    fit(tmp_path, MESH, steps=4, log_every=100)
    said = capsys.readouterr().out
    assert "step 4: loss " in said and "times the usual for its prompts, on clip3" in said


def test_the_worst_batches_of_earlier_starts(tmp_path):
    fit(tmp_path / "whole", MESH)
    with pytest.raises(Killed):
        fit(tmp_path / "torn", MESH, kill_at=9)
    fit(tmp_path / "torn", MESH)
    worst = [json.loads((tmp_path / name / "worst.json").read_text()) for name in ("whole", "torn")]
    assert worst[0] == worst[1] and len(worst[0]["worst"]) == 10
    assert [step for step, _ in worst[0]["recent"]] == list(range(1, 11))


@pytest.mark.parametrize("stops", [False, True])
def test_a_report_after_skipped_steps_has_the_state_before_the_step(tmp_path, stops):
    """Step 8 is fine and launched before step 7 is read, were the loop not to look closer."""
    if stops:
        with pytest.raises(loop.Stopped):
            fit(tmp_path / "bad", MESH, bad=(5, 6, 7), skip=2, stop_at=6)
    with pytest.raises(UserError, match="step 7 is not finite"):
        fit(tmp_path / "bad", MESH, bad=(5, 6, 7), skip=2)
    path = tmp_path / "bad/bad/7/report.json"
    assert reports.read_report(path)["step"] == 7 and reports.read_report(path)["exact"]
    _, _, like = setup(MESH)
    saved = arrays.read(path.parent / "state", like._asdict())["params"]
    with pytest.raises(loop.Stopped):
        fit(tmp_path / "fine", MESH, stop_at=4)
    fine = arrays.read(tmp_path / "fine/checkpoints/4/params", like.params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, saved, fine)))
