"""Evaluation in training: named sets and prompts, what is logged, who tracks."""

import errno

import jax
import ml_collections
import numpy as np
import pytest

from sam2_jax import checkpoint, validation
from sam2_jax.validation import EvalSet
from tests.test_evaluate import RESOLUTION, FakeTracker, Squares


@pytest.fixture
def fake(monkeypatch):
    tracker = FakeTracker(lambda t, first, truth: truth)
    monkeypatch.setattr(validation, "_tracker", lambda model, precision: tracker.tracker())
    return tracker


def config(**changes):
    settings = {"max_clips": 1, "max_frames": 6, "prompts": ("mask",)} | changes
    rest = {"model": {"resolution": RESOLUTION}, "train": {"precision": "float32"}}
    return ml_collections.ConfigDict(rest | {"eval": settings})


def sharded_params():
    mesh = jax.sharding.Mesh(jax.devices(), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    return jax.device_put(np.arange(8.0), split)


def test_row_picture_and_line(fake, tmp_path, capsys):
    sets = [EvalSet("", Squares())]
    row = validation.validate(config(), "model", sets, tmp_path, sharded_params(), 30)
    assert sorted(row) == ["eval/F", "eval/J", "eval/J&F", "eval/static J", "eval/static J&F"]
    assert row["eval/J&F"] > 0.93 > row["eval/static J&F"] and fake.calls == {6: 1}
    # One device tracks, with parameters that are whole.
    assert len(fake.params.devices()) == 1 and fake.params.tolist() == list(range(8))
    assert (tmp_path / "overlay.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("step 30: J&F 0.") and "static" in out


def test_sets_and_prompts_have_rows_of_their_own(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fake, "tracker", lambda: fake.first)
    monkeypatch.setattr(
        validation.evaluate,
        "tracker_predictor",
        lambda tracker, params, resolution, prompt, note: predictors[prompt],
    )

    def static(frames, masks, num_frames):
        for _ in frames:
            yield (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0).astype(np.uint8)

    def nothing(frames, masks, num_frames):
        for _ in frames:
            yield np.zeros(masks.shape[1:], np.uint8)

    predictors = {"mask": static, "click3": nothing}
    sets = [EvalSet("", Squares()), EvalSet("far", Squares(num_frames=20))]
    settings = config(prompts=("mask", "click3"), max_frames=0)
    row = validation.validate(settings, "model", sets, tmp_path, np.zeros(1), 1)
    for name in ("eval/", "eval/far/"):
        assert row[f"{name}J"] == row[f"{name}static J"] > row[f"{name}click3/J"] == 0
    assert row["eval/far/J"] < row["eval/J"]
    assert len(row) == 16
    assert {path.name for path in tmp_path.iterdir()} == {"overlay.png", "overlay-far.png"}
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split(": J&F")[0] for line in lines]
    assert starts == ["step 1", "step 1, click3", "step 1, far", "step 1, far click3"]


def test_a_picture_for_which_there_is_no_room(fake, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(validation.plots, "overlay_sheet", full)
    with pytest.raises(checkpoint.Unwritten, match=f"{tmp_path} could not .*disk is full"):
        validation.validate(config(), "model", [EvalSet("", Squares())], tmp_path, np.zeros(1), 30)
