"""scripts/benchmark.py: wrong flags, workers that fail, figures and pictures."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import default
from sam2_jax import work
from sam2_jax.benchmarks import (
    clips,
    compiling,
    data,
    inference,
    looping,
    ours,
    plot,
    reference,
    report,
    serving,
    settings,
    step,
    workers,
)
from sam2_jax.types import UserError

SMALL = ["--variant=nano", "--resolution=64", "--frames=2", "--objects=2"]


class Fake:
    """Stands for a worker: answers take as long as its module says, a step after a pause longer."""

    def __init__(self, module, asked):
        self.seconds = 1.0 if module.endswith("ours") else 2.0
        self.module, self.asked = module, asked

    def ask(self, **request):
        paused = bool(self.asked) and self.asked[-1][0] != self.module
        self.asked.append((self.module, request))
        took = self.seconds + 9 * ("plan" in request and paused)
        if "objects" in request:
            took = [request["objects"] * took] * 12
        return {"seconds": took, "loss": 3.0, "peak_bytes": int(2**21 * self.seconds)} | {
            "peak_since": int(2**20 * self.seconds)
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.fixture
def asked(monkeypatch):
    """Requests to workers, none of which is a process."""
    found = []
    monkeypatch.setattr(workers, "started", lambda module, *_: Fake(module, found))
    monkeypatch.setattr(reference, "missing", lambda: "")
    return found


def test_a_step_is_told(asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "count", lambda *_: {"tflop_by_plan": {}})
    path = tmp_path / "step.json"
    plans = "mask1,point11"
    flags = [*SMALL, f"--plans={plans}", "--repeats=2", f"--json={path}"]
    step.run(default.get_config, flags)
    figures = json.loads(path.read_text())
    assert (figures["seconds"], figures["reference_seconds"]) == (1.0, 2.0)
    assert figures["seconds_ratio"] == figures["memory_ratio"] == 0.5
    assert figures["seconds_ratio_by_plan"] == {"mask1": 0.5, "point11": 0.5}
    assert (figures["peak_bytes"], figures["steady_peak_bytes"]) == (2**21, 2**20)
    assert (
        figures["steady_memory_ratio"] == 0.5
        and figures["all_seconds"]["ours"]["mask1"] == [1.0] * 2
    )
    assert figures["variant"] == "nano" and figures["plans"] == plans.split(",")
    # Weights are the reference's; then turn by turn, and memory in processes of their own
    assert [module for module, request in asked[:2]] == ["step_reference", "step_ours"]
    turns = [(module, request["plan"]) for module, request in asked[2:6]]
    sides = "step_ours", "step_reference"
    assert turns == [(side, plan) for plan in plans.split(",") for side in sides]
    assert len(asked) == 2 + (1 + 2 * 2) * 4 + 2 * 4
    told = capsys.readouterr().out
    assert "a step: nano, 64 px, 2 frames, 2 objects" in told and "peak of a process" in told
    table = [line.split() for line in told.splitlines()]
    assert ["point11", "ours", "1", "0.5", "1", "1", "3"] in table
    assert ["point11", "reference", "2", "-", "2", "2", "3"] in table


def test_a_step_without_the_reference(asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "missing", lambda: "torch")
    monkeypatch.setattr(step, "count", lambda *_: {})
    path = tmp_path / "step.json"
    step.run(default.get_config, [*SMALL, "--plans=mask1", f"--json={path}"])
    figures = json.loads(path.read_text())
    assert figures["reference_seconds"] is None and figures["seconds_ratio"] is None
    assert {module for module, _ in asked} == {"step_ours"}
    assert "without the reference: torch cannot be imported" in capsys.readouterr().out


def test_work_that_is_guessed_is_told(monkeypatch, tmp_path, capsys):
    sure, guess = work.Work(10**12), work.Work(10**12, guessed=2)
    scopes = {"mask1": {"": sure}, "mask2": {"": sure, "a": guess}}
    monkeypatch.setattr(ours, "count", lambda *_: scopes)
    path = tmp_path / "step.json"
    flags = [*SMALL, "--plans=mask1,mask2", "--work-only", "--reference=no", f"--json={path}"]
    step.run(default.get_config, flags)
    assert json.loads(path.read_text())["tflop_by_plan"] == {"mask1": 1.0, "mask2": 2.0}
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: mask2 does not settle 2 branches")


def test_parts_of_a_step_that_are_more_than_it_are_told(monkeypatch, tmp_path):
    spent = {name: [9.0] * 3 + [1.0, 9.0] for name in (looping.WAIT, looping.READ)}
    monkeypatch.setattr(looping, "measure", lambda *_: (spent, 1.5))
    monkeypatch.setattr(serving, "use_threads", lambda threads: None)
    path = tmp_path / "loop.json"
    looping.run(default.get_config, [*SMALL, f"--json={path}"])
    figures = json.loads(path.read_text())
    parts = {looping.WAIT: 1.0, looping.READ: 1.0, "other": -0.5}
    assert figures["seconds"] == 1.5 and figures["seconds_by_part"] == parts


@pytest.mark.parametrize("where", ["no/such.json", "", "file/such.json"])
@pytest.mark.parametrize("command", ["compile", "data", "inference", "loop", "step"])
def test_a_file_that_cannot_be_written_is_told_at_once(monkeypatch, tmp_path, command, where):
    (tmp_path / "file").touch()
    monkeypatch.setattr(clips, "render", None)
    monkeypatch.setattr(looping, "measure", None)
    run = {
        "compile": lambda *flags: compiling.run(default.get_config, [*SMALL, *flags]),
        "data": lambda *flags: data.run([f"--data_root={tmp_path}", *flags]),
        "inference": lambda *flags: inference.run([*SMALL[:2], *flags]),
        "loop": lambda *flags: looping.run(default.get_config, [*SMALL, *flags]),
        "step": lambda *flags: step.run(default.get_config, [*SMALL, *flags]),
    }[command]
    with pytest.raises(UserError, match=r"--json=.* cannot be written \(.*\): give a file"):
        run(f"--json={tmp_path / where}")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_inference_is_told(asked, tmp_path, capsys):
    path = tmp_path / "video.json"
    flags = ["--variant=nano", "--resolution=64", "--frames=12", "--objects=1,2"]
    inference.run([*flags, f"--json={path}"])
    figures = json.loads(path.read_text())
    assert figures["by_objects"]["1"]["frames_per_second"] == 1.0
    assert (figures["seconds"], figures["reference_seconds"]) == (2.0, 4.0)
    assert figures["memory_ratio"] == 0.5
    assert len(figures["by_objects"]["2"]["all_seconds"]["ours"]) == 2 * (11 - inference.FILLING)
    assert "frames/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flag", "expected"),
    [
        ("step", "--variant=giant", "--variant=giant: expected one of nano"),
        ("step", "--resolution=100", "--resolution=100 is no multiple of 32: take 96"),
        ("step", "--frames=0", "--frames=0 must be at least 1"),
        ("step", "--repeats=0", "--repeats=0 must be at least 1"),
        ("step", "--plans=mask1,point21", "'point21' is no plan: .* expect"),
        ("step", "--plans=scribble", "'scribble' is no plan: expected mask1"),
        ("step", "--plans=", "--plans= is empty"),
        ("step", "--reference=perhaps", "--reference=perhaps: expected yes, no or auto"),
        ("step", "--reference=yes", "needs the reference, and torch cannot be imported"),
        ("step", "--precision=int7", "train.precision"),
        ("step", "--attention=x", "model.attention"),
        ("step", "--bad=1", "--bad=1"),
        ("step", "--objects=30", "--objects=30: of 2 rendered clips only 0"),
        ("inference", "--objects=1,no", "--objects=1,no: expected numbers"),
        ("inference", "--frames=9", "--frames=9: of the first 8 and the last no time is taken"),
        ("loop", "--steps=2", "--steps=2 must be at least 5"),
    ],
)
def test_wrong_flags_are_named(monkeypatch, command, flag, expected):
    monkeypatch.setattr(reference, "missing", lambda: "torch")
    monkeypatch.setattr(clips, "render", clips.render if "objects=30" in flag else None)
    monkeypatch.setattr(clips, "TRIES", 2)
    small = ["--variant=nano", "--resolution=64"]
    run = {
        "step": lambda: step.run(default.get_config, [*small, "--plans=mask1", flag]),
        "inference": lambda: inference.run([*small, "--frames=12", flag]),
        "loop": lambda: looping.run(default.get_config, [*small, flag]),
    }
    with pytest.raises(UserError, match=expected):
        run[command]()


def test_plans_that_a_clip_is_too_short_for():
    with pytest.raises(UserError, match="needs clips of at least 2 frames"):
        settings.parse_plans("mask2", 1)
    with pytest.raises(UserError, match="not for single images"):
        settings.parse_plans("mask1", 1)
    assert settings.parse_plans("point11", 1) == ["point11"]


def test_a_process_that_dies_is_told(tmp_path):
    worker = workers.Worker("no_such_module", tmp_path)
    with pytest.raises(UserError, match="no_such_module ended with status 1 .*No module named"):
        worker.ask(plan="mask1")
    worker.close()


def test_clips_show_all_their_objects():
    images, masks = clips.render(2, 3, 2, 64)
    assert images.shape == (2, 3, 64, 64, 3) and images.dtype == np.uint8
    assert masks.shape == (2, 3, 2, 64, 64) and masks.dtype == bool
    assert masks[:, 0].any((-2, -1)).all() and not masks.all(2).any()


def write_step(folder: pathlib.Path, name: str, **changes) -> str:
    figures = {"variant": "nano", "frames": 4, "objects": 1, "resolution": 64, "batch_size": 1}
    figures |= {"threads": 1, "precision": "float32", "remat": "none", "attention": "auto"}
    figures |= {"plans": ["mask1"], "seconds": 1.0, "reference_seconds": None}
    figures |= {"tflop_by_plan": {"mask1": 2.0, "point11": 4.0}, "reference_tflop_by_plan": None}
    report.write(folder / name, figures | changes)
    return str(folder / name)


def image_size(path: pathlib.Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_costs_are_drawn(tmp_path):
    files = [
        write_step(tmp_path, "a.json"),
        write_step(tmp_path, "b.json", frames=8, seconds=1.9, tflop_by_plan={"mask1": 6.0}),
        write_step(tmp_path, "c.json", frames=8, variant="tiny"),
    ]
    output = tmp_path / "cost.png"
    plot.run(["--json", *files, f"--output={output}"])
    assert output.read_bytes()[:4] == b"\x89PNG"
    read = [plot.read(pathlib.Path(path)) for path in files]
    (points,) = plot.lines(read, "frames", "tflop_by_plan").values()
    assert points == [(4, 3.0), (8, 6.0)]
    assert not plot.lines(read, "objects", "seconds")
    assert not plot.lines(read, "frames", "peak_bytes")
    plain = image_size(output)
    files += [write_step(tmp_path, f"m{n}.json", frames=n, peak_bytes=n * 2**30) for n in (2, 4)]
    plot.run(["--json", *files, f"--output={output}"])
    assert image_size(output) == (plain[0], plain[1] * 3 // 2)  # a row for memory
    with pytest.raises(UserError, match="no two files differ"):
        plot.run(["--json", files[0], f"--output={output}"])
    with pytest.raises(UserError, match=r"--json=.*x\.json cannot be read"):
        plot.run(["--json", str(tmp_path / "x.json"), f"--output={output}"])
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(UserError, match=r"d\.json is no file of `benchmark\.py step`"):
        plot.run(["--json", str(tmp_path / "d.json"), f"--output={output}"])
    with pytest.raises(UserError, match="cannot be written"):
        plot.run(["--json", *files, f"--output={tmp_path / 'no' / 'x.png'}"])


def test_a_process_that_measures_has_one_library():
    """The reference's must not hold JAX, whose memory would count as the reference's."""
    code = "import sys; from sam2_jax.benchmarks import step_reference, video_reference"
    code += "; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(workers.ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.skipif(not serving.CLEAR.exists(), reason="only Linux forgets a peak")
def test_a_peak_is_forgotten():
    code = """if True:
        import numpy as np
        from sam2_jax.benchmarks import serving
        def answer(request):
            np.ones(request["size"], np.uint8)
            return {}
        serving.serve(lambda folder: answer)
    """
    mib = 2**20
    requests = [{"size": 300 * mib}, {"size": mib, "forget_peak": True}, {"size": 100 * mib}]
    done = subprocess.run(
        [sys.executable, "-c", code, "folder"],
        env=os.environ | {"PYTHONPATH": str(workers.ROOT)},
        input="".join(json.dumps(x) + "\n" for x in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    first, small, middle = map(json.loads, done.stdout.splitlines())
    assert first["peak_since"] == first["peak_bytes"] > 300 * mib
    assert small["peak_bytes"] == middle["peak_bytes"] == first["peak_bytes"]
    assert small["peak_since"] < first["peak_bytes"] - 250 * mib
    assert 80 * mib < middle["peak_since"] - small["peak_since"] < 120 * mib


def test_sizes_are_checked_alike():
    args = argparse.Namespace(variant="nano", resolution=64, frames=1, threads=0)
    with pytest.raises(UserError, match="--threads=0"):
        settings.check(args)
