"""scripts/benchmark.py: tables and JSON, with and without the reference, and wrong flags."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam2_jax.benchmarks import report
from sam2_jax.types import UserError

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "benchmark.py"
CLIPS = ("owl", "ant")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> pathlib.Path:
    """Two flat clips of five frames with two objects."""
    root = tmp_path_factory.mktemp("clips")
    for clip in CLIPS:
        for t in range(5):
            labels = np.zeros((48, 64), np.uint8)
            labels[16:32, 16 + t : 30 + t], labels[18:30, 34:48] = 1, 2
            for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
                folder = root / kind / clip
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(labels)
                if suffix == "jpg":
                    image = Image.fromarray(np.stack([labels * 90] * 3, -1))
                else:
                    image.putpalette(list(range(256)) * 3)
                image.save(folder / f"{t:05d}.{suffix}")
    return root


def run(script, clips, tmp_path, *flags):
    path = tmp_path / "figures.json"
    sizes = ("--resolution=64", "--frames=3", "--objects=2", "--seconds=0")
    script.main(["data", f"--data_root={clips}", f"--json={path}", *sizes, *flags])
    assert list(tmp_path.iterdir()) == [path]
    return json.loads(path.read_text())


def test_data_without_the_reference(script, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "training", None)
    figures = run(script, clips, tmp_path)
    assert figures["reference_frames_per_second_per_core"] is None and figures["speedup"] is None
    kinds = "", "decode_", "augment_"
    assert all(figures[f"{kind}frames_per_second_per_core"] > 0 for kind in kinds)
    assert figures["clips"] == 2 and figures["objects"] == 2 and figures["wait_share"] is None
    told = capsys.readouterr().out
    assert "2 clips of 3 frames, 2.0 objects, 64 pixels" in told
    assert "reference                   none: not installed" in told


@pytest.mark.parametrize("step, least, most", [(1e-9, 0.99, 1.0), (1e3, 0.0, 0.0)])
def test_wait_of_a_step(script, clips, tmp_path, monkeypatch, capsys, step, least, most):
    monkeypatch.setitem(sys.modules, "training", None)
    flags = f"--step_seconds={step}", "--workers=4", "--batch_size=2"
    figures = run(script, clips, tmp_path, *flags)
    assert least <= figures["wait_share"] <= most
    assert figures["load_seconds"] == pytest.approx(
        2 * 3 / figures["frames_per_second_per_core"] / 4
    )
    assert "4 core(s) load 2 clip(s)" in capsys.readouterr().out


def test_data_beside_the_reference(script, clips, tmp_path, capsys):
    pytest.importorskip("torchvision")
    pytest.importorskip("training.dataset.transforms")
    figures = run(script, clips, tmp_path)
    reference = figures["reference_frames_per_second_per_core"]
    assert 0 < reference < figures["reference_until_uint8_frames_per_second_per_core"]
    assert figures["speedup"] == pytest.approx(figures["frames_per_second_per_core"] / reference)
    assert "times the reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "--data_root"),
        (["--data_root=x", "--bad=1"], "--bad=1"),
        (["--data_root=x", "--frames=0"], "--frames=0 must be at least 1"),
        (["--data_root=nowhere"], "--data_root=nowhere"),
    ],
)
def test_wrong_flags_are_named(script, flags, expected):
    with pytest.raises(UserError, match=expected):
        script.main(["data", *flags])


def test_json_that_cannot_be_written(tmp_path):
    path = tmp_path / "no" / "such.json"
    with pytest.raises(UserError, match=r"--json=.*such\.json cannot be written"):
        report.write(path, {})


def test_an_unknown_command_is_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "bake"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert done.returncode == 2
    known = "compile, data, inference, loop, plot, step"
    assert done.stderr == f"error: unknown command 'bake', expected one of {known}\n"


def test_help_tells_the_commands(script, capsys):
    script.main([])
    assert "benchmark.py data --data_root" in capsys.readouterr().out
