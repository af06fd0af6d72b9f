"""What a run leaves to read: rows, curves, the best and the worst."""

import errno
import json
import math
import os
import sys
from unittest import mock

import pytest
from PIL import Image
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore

from sam2_jax import records
from sam2_jax.types import UserError
from tests.test_events import read


@pytest.mark.parametrize("step", [0, 7])
def test_curves_of_a_run_that_died_are_purged(tmp_path, step):
    records.Records(tmp_path, step).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    starts = [e.step for e in read(file) if e.session_log.status == SessionLog.START]
    assert starts == [step + 1]


def test_cut_after_keeps_whole_rows_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/J": 0.5}\n{"step": 3}\n{"st')
    records.cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/J": 0.5}\n'
    assert records.plain(float("inf")) is None


@pytest.mark.parametrize("line", [b'{"step": 2', b"3", b'{"loss": 1.0}', b'{"step": 2, "\xff": 1}'])
def test_a_damaged_row_among_others_is_named(tmp_path, line):
    """What follows it would be lost."""
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(before)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 of 3 is damaged .*delete that"):
        records.cut_after(path, 3)
    assert path.read_bytes() == before


def test_an_evaluation_is_found_by_its_step(tmp_path):
    path = tmp_path / records.METRICS
    assert not records.was_evaluated(path, 2)
    path.write_text('{"step": 1, "eval/J": 0.5}\n{"step": 2, "loss": 1.0}\n')
    assert records.was_evaluated(path, 1) and not records.was_evaluated(path, 2)


@pytest.mark.parametrize(
    ("is_lowest", "values", "best"), [(False, (1.0, 3.0, 2.0), 2), (True, (2.0, 3.0, 1.0), 3)]
)
def test_the_best_evaluation_is_kept(tmp_path, is_lowest, values, best):
    log = records.Records(tmp_path)
    log.best("eval/x", is_lowest)
    assert not (tmp_path / "best.json").exists()
    for step, value in enumerate(values, 1):
        log.write(step, {"eval/x": value, "eval/other": 99.0})
        log.best("eval/x", is_lowest)
    log.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == best
    log.path.write_text(log.path.read_text() + json.dumps({"step": 4, "eval/x": values[best - 1]}))
    for kept, step in ((None, 4), ({best}, best), (set(), best)):  # of equals the last
        log.best("eval/x", is_lowest, kept)
        assert json.loads((tmp_path / "best.json").read_text())["step"] == step
    # A run that went back to step 1 forgets what it has not yet done again.
    log = records.Records(tmp_path, 1)
    log.best("eval/x", is_lowest)
    log.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    run, package = mock.Mock(), mock.Mock()
    package.init.return_value = run
    monkeypatch.setitem(sys.modules, "wandb", package)
    for step in (0, 5):  # started, and gone on with
        log = records.Records(tmp_path, step, "mine")
        log.write(step + 1, {"loss": 2.0})
        Image.new("RGB", (4, 4)).save(tmp_path / "overlay.png")
        log.pictures(step + 1, 0.0)
        log.close()
    first, second = (call.kwargs for call in package.init.call_args_list)
    assert first == second and first["project"] == "mine"
    assert run.log.call_args_list[0] == mock.call({"loss": 2.0}, step=1)
    assert "eval/overlay" in run.log.call_args_list[1].args[0]
    assert run.finish.call_count == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        records.Records(tmp_path, 0, "mine")


def test_pictures_are_shown_once(tmp_path):
    log = records.Records(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "overlay.png")
    drawn = (tmp_path / "overlay.png").stat().st_mtime
    log.pictures(1, drawn + 1)
    before = sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
    log.pictures(2, drawn)
    log.close()
    after = sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
    assert after > before


def test_an_evaluation_before_a_torn_row_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not records.was_evaluated(path, 4)
    path.write_text('{"step": 4, "eval/J": 0.5}\n{"step": 5, "lo')
    assert records.was_evaluated(path, 4) and not records.was_evaluated(path, 5)


@pytest.mark.parametrize(
    "text",
    ["", '{"worst": [{"loss": 1.0, "st', "3", "{}x", '{"worst": [{"loss": 1}]}', "[[1]]", "{}"],
)
def test_a_torn_list_of_the_worst_is_begun_anew(tmp_path, capsys, text):
    path = tmp_path / "worst.json"
    path.write_text(text)
    log = records.Records(tmp_path, 3)
    assert log.read_worst(3) == records.NOTHING_SEEN
    assert f"note: {path} cannot be read" in capsys.readouterr().out
    first, second = (math.inf, 2, 9.0, ["a"]), (1.0, 4, math.inf, ["b"])
    log.worst(records.Seen([first, second], [(2, 9.0), (4, 1.0)]))
    assert log.read_worst(3) == records.Seen([first], [(2, 9.0)])
    assert log.read_worst(4) == records.Seen([first, second], [(2, 9.0), (4, 1.0)])
    assert not capsys.readouterr().out
    log.close()


def test_a_file_is_replaced_once_the_new_one_is_on_disk(tmp_path, monkeypatch):
    log = records.Records(tmp_path)
    log.worst(records.Seen([(1.0, 1, 1.0, ["a"])], []))
    before = (tmp_path / "worst.json").read_text()

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(records.os, "fsync", full)
        with pytest.raises(OSError):
            log.worst(records.NOTHING_SEEN)
    assert (tmp_path / "worst.json").read_text() == before
    log.close()


def test_all_is_closed_where_nothing_can_be_written(tmp_path, monkeypatch):
    package = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", package)
    rows, events = open("/dev/full", "w"), open("/dev/full", "wb")  # noqa: SIM115
    monkeypatch.setattr(record_writer, "open_file", lambda path: events)
    log = records.Records(tmp_path, 0, "mine")
    log._file.close()
    monkeypatch.setattr(log, "_file", rows)
    with pytest.raises(OSError):
        log.write(1, {"loss": 1.0})
    with pytest.raises(OSError):
        log.close()
    assert rows.closed and events.closed
    assert package.init.return_value.finish.call_count == 1
