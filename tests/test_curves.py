"""The curves of a run."""

import json

import cv2
import numpy as np
import pytest

from sam2_jax import curves


def log(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def rows(count):
    for step in range(count):
        yield {"step": step, "loss": 20 / (1 + step), "loss_mask": 0.5, "learning_rate": 1e-4}


@pytest.mark.parametrize("count", [0, 1, 200])
def test_loss_curves_draws_any_length(tmp_path, count):
    scores = {"step": 3, "eval/J&F": 0.5, "eval/static J&F": 0.3, "eval/J": None}
    path = log(tmp_path / "metrics.jsonl", [*rows(count), *([scores] * count)], '{"step": 9, "lo')
    curves.loss_curves(path, tmp_path / "loss.png")
    picture = cv2.imread(str(tmp_path / "loss.png"))
    assert picture is not None and picture.std() > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_curves_read_the_right_numbers(tmp_path):
    path = log(tmp_path / "m", [*rows(3), {"step": 2, "eval/J": 0.25}], "{")
    read = curves._read(path)
    np.testing.assert_array_equal(curves._series(read, "loss")[1], [20, 10, 20 / 3])
    np.testing.assert_array_equal(curves._series(read, "eval/J"), [[2], [0.25]])
    assert len(curves._series(read, "absent")[0]) == 0


def test_scores_of_every_set_and_prompt_are_drawn():
    one = {"eval/J&F": 1, "eval/J": 1, "eval/F": 1, "eval/static J&F": 1, "eval/loss": 1}
    assert curves._scores([{"loss": 1}, one]) == ["eval/J&F", "eval/J", "eval/F"]
    two = {f"eval/{name}": 1 for name in ("a/J&F", "a/J", "a/click3/J&F", "a/static J&F")}
    assert curves._scores([two]) == ["eval/a/J&F", "eval/a/click3/J&F"]
    assert curves._scores([{"step": 1}]) == []


def test_drawing_takes_little_of_a_run(tmp_path, monkeypatch):
    """Time is a clock of the test's own: a drawing takes 2 s, so 200 s must pass to the next."""
    now, drawn = [1000.0], []

    def draw(*args):
        drawn.append(now[0])
        now[0] += 2

    monkeypatch.setattr(curves.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(curves, "loss_curves", draw)
    picture = curves.Curves(tmp_path)
    for _ in range(100):
        picture.draw()
        now[0] += 5
    assert drawn == [1000.0, 1202.0, 1404.0]
    picture.draw(at_once=True)
    assert len(drawn) == 4


def test_smoothing_keeps_a_line_and_reduces_noise():
    line = np.arange(100.0)
    np.testing.assert_allclose(curves._smooth(line), line)
    noise = np.random.default_rng(0).standard_normal(400)
    assert curves._smooth(noise).std() < 0.4 * noise.std()
