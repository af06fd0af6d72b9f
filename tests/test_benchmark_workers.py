"""scripts/benchmark.py's processes: what they are handed, and that each one really measures."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from configs import default
from sam2_jax.benchmarks import (
    compiling,
    inference,
    looping,
    plans,
    reference,
    serving,
    settings,
    step,
    step_reference,
    workers,
)
from sam2_jax.model.variants import VARIANTS

SIZES = ["--variant=nano", "--resolution=32", "--threads=2"]
MIB = 2**20
# Those that start processes too run where all can: they take minutes
NEEDED = pytest.mark.skipif(bool(reference.missing()), reason="the reference is not installed")


@pytest.fixture
def cached(monkeypatch):
    """Processes that are started keep what they compile where these tests do."""
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", str(jax.config.values["jax_compilation_cache_dir"])
    )
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "figures.json"


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@NEEDED
def test_a_step(cached, monkeypatch, path, capsys):
    monkeypatch.setattr(step, "count", lambda *_: {})  # see test_benchmark_work.py
    flags = ["--frames=1", "--objects=1", "--plans=point11", "--repeats=1", "--reference=no"]
    step.run(default.get_config, [*SIZES, *flags, f"--json={path}"])
    found = read(path)
    (seconds,) = found["all_seconds"]["ours"]["point11"]
    assert 0 < seconds == found["seconds"] == found["seconds_by_plan"]["point11"]
    assert "point11, ours: " in capsys.readouterr().err
    assert 0 < found["first_losses"]["ours"]["point11"] < 1e6
    assert 100 * MIB < found["steady_peak_bytes"] <= found["peak_bytes"] < 2**34
    assert found["reference_seconds"] is None and found["memory_ratio"] is None


@NEEDED
def test_inference(cached, path):
    flags = [f"--frames={inference.FILLING + 3}", "--objects=1", "--repeats=1", "--reference=no"]
    inference.run([*SIZES, *flags, f"--json={path}"])
    found = read(path)
    times = found["by_objects"]["1"]["all_seconds"]["ours"]
    assert len(times) == 2 and all(1e-4 < x < 60 for x in times)
    assert found["seconds"] == pytest.approx(sum(times) / 2)
    assert found["frames_per_second"] == pytest.approx(1 / found["seconds"])
    assert 100 * MIB < found["peak_bytes"] < 2**34 and found["reference_seconds"] is None


@NEEDED
def test_the_time_to_the_first_step(cached, monkeypatch, path):
    """Of one process, which finds what it compiles in the tests' cache: cold it takes a minute."""
    first_step, answers = compiling.first_step, []

    def once(folder: pathlib.Path) -> dict[str, Any]:
        if not answers:
            (folder / "cache").symlink_to(os.environ["JAX_COMPILATION_CACHE_DIR"])
            answers.append(first_step(folder))
        return answers[0]

    monkeypatch.setattr(compiling, "first_step", once)
    flags = ["--frames=1", "--objects=1", f"--json={path}"]
    compiling.run(default.get_config, [*SIZES, *flags])
    found = read(path)
    for kind in (compiling.COLD, compiling.WARM):
        seconds, peaks = (found[f"{kind}_{x}_by_phase"] for x in ("seconds", "peak_bytes"))
        assert list(seconds) == ["import", "init", "trace", "lower", "compile", "first run"]
        assert all(0 < x < 600 for x in seconds.values())
        assert found[f"{kind}_seconds"] == pytest.approx(sum(seconds.values()))
        assert list(peaks) == list(seconds) and list(peaks.values()) == sorted(peaks.values())
        assert peaks["import"] > 50 * MIB


@NEEDED
def test_the_loop(cached, path):
    """In a process of its own: it keeps to so many cores, and to one device."""
    script = workers.ROOT / "scripts" / "benchmark.py"
    flags = ["--frames=1", "--objects=1", "--steps=6", f"--json={path}"]
    done = subprocess.run(
        [sys.executable, str(script), "loop", *SIZES, *flags],
        env=os.environ | settings.environment(settings.OURS),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = read(path)
    parts = found["seconds_by_part"]
    calls = {looping.WAIT, looping.TRANSFER, looping.DISPATCH, looping.READ}
    assert parts.keys() == calls | {"other"}
    assert all(0 < parts[name] < 60 for name in calls)
    assert sum(parts.values()) == pytest.approx(found["seconds"])
    assert "a step of the loop: nano, 32 px, 1 frames, 1 objects" in done.stdout


def test_settings_and_plans_come_back_as_they_were(tmp_path):
    config = default.get_config("tiny")
    given = {name: plans.make(name, 3, 7) for name in ("mask1", "box12")}
    setup = {"config": config.to_dict(), "variant": VARIANTS["tiny"]._asdict(), "threads": 2}
    images, masks = np.zeros((1, 3, 8, 8, 3), np.uint8), np.ones((1, 3, 2, 8, 8), bool)
    workers.prepare(tmp_path, setup, images, masks, given)
    assert repr(serving.read_setup(tmp_path)) == repr(setup)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".npz"}
    found = serving.read_plans(tmp_path)
    assert list(found) == list(given)
    for name, fields in given.items():
        for field, x in fields.items():
            np.testing.assert_array_equal(found[name][field], x, strict=True)
    arrays = serving.read_arrays(tmp_path / serving.CLIPS)
    assert (arrays["images"] == images).all() and (arrays["masks"] == masks).all()


def test_nothing_is_unpickled(tmp_path):
    given: dict[str, Any] = {"mask1.order": np.array([None])}
    np.savez(tmp_path / serving.PLANS, **given)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        serving.read_plans(tmp_path)


@NEEDED
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_computes_in_the_precision_asked_for(tmp_path, monkeypatch, precision):
    """As its trainer on its device: model and losses under autocast, parameters in float32."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    monkeypatch.setattr(serving, "use_threads", lambda threads: None)
    sides, dtypes = [], set()
    make_side = reference.make_side

    def watched(*args):
        sides.append(make_side(*args))
        sides[0].model.memory_attention.register_forward_hook(
            lambda module, given, out: dtypes.add(module.layers[0].linear1(out).dtype)
        )
        return sides[0]

    monkeypatch.setattr(reference, "make_side", watched)
    variant = VARIANTS["nano"]._asdict()
    setup = {"variant": variant, "resolution": 64, "threads": 1, "precision": precision}
    images, masks = np.zeros((1, 2, 64, 64, 3), np.uint8), np.zeros((1, 2, 1, 64, 64), bool)
    masks[..., 10:40, 20:30] = True
    given = {"mask1": plans.make("mask1", 2, 7), "point11": plans.make("point11", 2, 7)}
    workers.prepare(tmp_path, setup, images, masks, given)
    answer = step_reference.make(tmp_path)
    for name in given:
        assert 0 < answer({"plan": name})["loss"] < 1e6
    assert dtypes == {getattr(torch, precision)}
    assert {x.dtype for x in sides[0].model.parameters()} == {torch.float32}
