"""scripts/evaluate.py: checkpoint and folder in, palette images and results.json out."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from sam2_jax import convert, metrics, plots, weights
from sam2_jax.data.folders import EVAL, open_folder
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.predict import video
from sam2_jax.types import UserError

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "evaluate.py"
SIZE, FRAMES, RESOLUTION = (72, 96), 6, 64
IDS = (3, 7)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def davis(tmp_path_factory) -> pathlib.Path:
    """Two clips of two moving squares, the second named in every fifth frame, as YouTube-VOS's."""
    root = tmp_path_factory.mktemp("davis")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("one\ntwo\n")
    for clip, stride in (("one", 1), ("two", 5)):
        for t in range(FRAMES):
            labels = np.zeros(SIZE, np.uint8)
            labels[8 + 2 * t : 32 + 2 * t, 8:32] = IDS[0]
            labels[8:32, 48 + 2 * t : 72 + 2 * t] = IDS[1]
            for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
                folder = root / kind / "480p" / clip
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(labels)
                if suffix == "jpg":
                    image = Image.fromarray(np.stack([labels * 30] * 3, -1))
                else:
                    image.putpalette(list(range(256)) * 3)
                image.save(folder / f"{t * stride:05d}.{suffix}")
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A run of `nano`, steps 2 and 4, whose weights are 2 and 4 everywhere."""
    path = tmp_path_factory.mktemp("run")
    model = {"variant": "nano", "resolution": RESOLUTION, "version": "2.1"}
    (path / "config.json").write_text(json.dumps({"model": model}))
    sam2 = make_sam2("nano", RESOLUTION)
    shapes = jax.eval_shape(lambda: init_params(sam2, jax.random.key(0)))
    for step in (2, 4):
        params = jax.tree.map(lambda x, step=step: np.full(x.shape, step, x.dtype), shapes)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "checkpoints" / str(step) / "params", params)
    return path


def static_tracker(model, precision="") -> video.Tracker:
    """Tracks nothing, at a precision of four pixels."""

    def low(masks):
        side = RESOLUTION // 4
        return masks.reshape(len(masks), side, 4, side, 4).mean((2, 4)).astype(np.float32) - 0.5

    def first(params, image, masks, num_frames) -> Any:
        return masks, low(masks)

    def following(params, masks, image) -> Any:
        return masks, low(masks)

    return video.Tracker(first, first, first, following)


def read(path: pathlib.Path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "P"
    assert (image.getpalette() or [])[9:12] == [128, 128, 0]  # index 3, as in DAVIS
    return np.array(image)


def test_writes_what_it_scores(script, davis, workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "make_tracker", static_tracker)
    script.main([f"--checkpoint={workdir}", f"--data_root={davis}", f"--output={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())
    names = {"one": [f"{t:05d}" for t in range(6)], "two": [f"{5 * t:05d}" for t in range(6)]}
    j, f = [], []
    for clip, stems in names.items():
        assert sorted(p.stem for p in (tmp_path / clip).iterdir()) == stems
        truth = davis / "Annotations/480p" / clip
        for k in IDS:
            pairs = [
                (
                    read(tmp_path / clip / f"{s}.png") == k,
                    np.array(Image.open(truth / f"{s}.png")) == k,
                )
                for s in stems[1:-1]
            ]
            j.append(np.mean([metrics.jaccard(*pair) for pair in pairs]))
            f.append(np.mean([metrics.boundary_f(*pair) for pair in pairs]))
            row = results["objects"][clip][str(k)]
            assert (row["J"], row["F"]) == pytest.approx((j[-1], f[-1]))
            assert row["J&F"] == pytest.approx((j[-1] + f[-1]) / 2)
    assert results["J"] == pytest.approx(np.mean(j)) and results["F"] == pytest.approx(np.mean(f))
    assert 0.3 < results["J&F"] < 0.95 and results["static"]["J"] == pytest.approx(
        results["J"], abs=0.1
    )
    assert (tmp_path / "overlay.png").is_file()
    assert "all: J&F" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "step"), [("", 4), ("checkpoints", 4), ("checkpoints/2", 2)])
def test_load_finds_the_step(script, workdir, suffix, step):
    model, params = script.load(workdir / suffix)
    assert model.resolution == RESOLUTION
    assert all((leaf == step).all() for leaf in jax.tree.leaves(params))


def test_load_names_what_is_wrong(script, workdir, tmp_path):
    with pytest.raises(UserError, match="--checkpoint=.*nowhere does not exist"):
        script.load(tmp_path / "nowhere")
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (workdir / "checkpoints/2/params").rename(lonely / "params")
    try:
        with pytest.raises(UserError, match="no config.json beside or above"):
            script.load(lonely)
        (lonely / "config.json").write_text("{}")
        with pytest.raises(UserError, match="describes no model"):
            script.load(lonely)
        (lonely / "config.json").write_text(
            json.dumps({"model": {"variant": "tiny", "resolution": 64, "version": "2.1"}})
        )
        with pytest.raises(UserError, match="does not fit"):
            script.load(lonely)
    finally:
        (lonely / "params").rename(workdir / "checkpoints/2/params")


def test_load_takes_files_of_weights(script, workdir, tmp_path):
    path = tmp_path / "w.safetensors"
    older = make_sam2("nano", 64, "2.0")
    params = jax.device_get(init_params(older, jax.random.key(0)))
    state = convert.to_reference(params)
    weights.write(path, state)
    model, loaded = script.load(path)
    assert model == make_sam2("nano", 1024, "2.0")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert script.load(path, 96)[0] == make_sam2("nano", 96, "2.0")
    with pytest.raises(UserError, match="resolution 100 is not"):
        script.load(path, 100)
    with pytest.raises(UserError, match=r"--resolution=96 is for files .*64 pixels"):
        script.load(workdir, 96)
    del state["no_obj_ptr"]
    weights.write(path, state, overwrite=True)
    with pytest.raises(UserError, match=r"w\.safetensors: .*lacks.*no_obj_ptr; .*nano 2\.0"):
        script.load(path)


def test_frames_before_the_first_annotation_are_background(script, davis, tmp_path):
    write = script.Writer(open_folder(str(davis), EVAL, key="--data_root"), tmp_path)
    labels, mask = np.full(SIZE, 1, np.uint8), np.ones((1, *SIZE), bool)
    image = np.zeros((*SIZE, 3), np.uint8)
    write(plots.View("one", 0, 2, 0, 4, image, (3,), labels, mask))
    assert [read(tmp_path / f"one/{t:05d}.png").max() for t in range(3)] == [0, 0, 3]


def test_a_wrong_flag_is_one_line():
    root = SCRIPT.parents[1]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--checkpoint=x", "--data_root=y", "--output=z", "--bad=1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 2
    assert done.stderr == "error: unrecognized arguments: --bad=1\n"
