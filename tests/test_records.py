"""What a run leaves to read: rows, curves, the best and the worst."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from sam2_jax import records


@pytest.mark.parametrize("step", [0, 7])
def test_curves_of_a_run_that_died_are_purged(tmp_path, step):
    records.Records(tmp_path, step).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [step + 1]


def test_cut_after_keeps_whole_rows_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/J": 0.5}\n{"step": 3}\n{"st')
    records.cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/J": 0.5}\n'
    assert records.plain(float("inf")) is None


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
    for step, value in enumerate(values, 1):
        log.best(step, {"eval/x": value}, "eval/x", is_lowest)
        log.best(step, {"eval/other": 99.0}, "eval/x", is_lowest)
    log.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == best
    # A run that went back to step 1 forgets what it has not yet done again.
    log = records.Records(tmp_path, 1)
    log.best(1, {"eval/x": 0.0}, "eval/x", is_lowest)
    log.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
