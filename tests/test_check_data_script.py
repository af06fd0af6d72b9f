"""scripts/check_data.py: faults planted in a folder are counted, and the exit status is right."""

import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from sam2_jax import config as config_lib
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
OWN_FLAGS = ("sample", "workers", "contact_sheet", "contact-sheet", "json")
FRAMES = 6


@pytest.fixture(scope="module")
def script() -> Any:
    # Other scripts have flags of the same names: absl knows one of each.
    others = {name: flags.FLAGS[name] for name in OWN_FLAGS if name in flags.FLAGS}
    for name in others:
        delattr(flags.FLAGS, name)
    spec = importlib.util.spec_from_file_location(
        "check_data_script", ROOT / "scripts/check_data.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags.FLAGS.mark_as_parsed()
    yield module
    for name in OWN_FLAGS:
        delattr(flags.FLAGS, name)
    for name, flag in others.items():
        flags.FLAGS[name] = flag
    flags.FLAGS.unparse_flags()


def write_clip(root: pathlib.Path, name: str, seed: int, frames: int = FRAMES, empty: int = 0):
    """A 30 x 20 object on all but the first `empty` frames."""
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for t in range(frames):
        pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / name / f"{t:05d}.jpg", quality=90)
        labels = np.zeros((48, 64), np.uint8)
        if t >= empty:
            labels[4:24, t : t + 30] = 1
        image = Image.fromarray(labels)
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.save(root / "Annotations" / name / f"{t:05d}.png")


@pytest.fixture
def clips(tmp_path) -> pathlib.Path:
    """Three clips to train on and one held out for evaluation."""
    for seed, name in enumerate(("ant", "bee", "cow", "dog")):
        write_clip(tmp_path / "clips", name, seed)
    return tmp_path / "clips"


@pytest.fixture
def check(script, tmp_path):
    """Run on a folder: (exit status, the JSON report)."""

    def run(root, policy="stop", max_bad=0.0, sample=0, eval_root="", sheet="", sets=None):
        config = config_lib.load_file(f"{ROOT}/configs/default.py:nano")
        config.model.resolution = 64
        config.data.root, config.data.eval_root = str(root), str(eval_root)
        config.data.num_frames = 4
        config.data.on_error, config.data.max_bad = policy, max_bad
        for name, folder in (sets or {}).items():
            with config.unlocked():
                config.eval.sets[name] = str(folder)
        report = tmp_path / "report.json"
        with flagsaver.flagsaver(sample=sample, json=str(report), contact_sheet=str(sheet)):
            status = script.main(config_lib.finish(config))
        return status, json.loads(report.read_text())

    return run


def spoil(path: pathlib.Path):
    """Break a JPEG where only decoding finds it: start, size and end stay as they are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd8" * 20
    path.write_bytes(data)


def test_sound_data(check, clips, capsys):
    write_clip(clips, "aaa", 9, empty=2)
    status, report = check(clips)
    assert status == 0 and report["works"]
    train, evaluation = report["sources"]
    assert (train["clips"], train["clips_read"], train["frames_read"]) == (4, 4, 4 * FRAMES)
    assert (evaluation["name"], evaluation["clips_read"]) == ("evaluation", 1)
    assert train["frames_without_object"] == 2
    assert train["empty_masks"] == pytest.approx(2 / 24)
    assert train["frame_sizes"] == [[64, 48]] and train["batches_per_epoch"] == 4
    assert train["mask_area"]["50"] == pytest.approx(600 / (48 * 64), rel=0.01)
    assert not report["duplicates"] and not report["leakage"]
    assert capsys.readouterr().out.splitlines()[-1] == "training would work"


@pytest.mark.parametrize(
    ("policy", "max_bad", "expected"), [("stop", 0.0, 1), ("skip", 0.2, 1), ("skip", 0.4, 0)]
)
def test_a_frame_that_breaks_on_decoding(check, clips, capsys, policy, max_bad, expected):
    spoil(clips / "JPEGImages/bee/00003.jpg")
    status, report = check(clips, policy, max_bad)
    assert status == expected
    train = report["sources"][0]
    assert train["unreadable"]["count"] == train["clips_unreadable"] == 1
    assert "bee/00003.jpg" in train["unreadable"]["first"][0]
    assert train["frames_read"] == 3 * FRAMES - 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("bee/00003.jpg" in last) == bool(expected)
    assert ("on_error=skip" in last) == (policy == "stop")


def test_evaluation_leaves_out_nothing(check, clips):
    spoil(clips / "JPEGImages/dog/00003.jpg")
    status, report = check(clips, "skip", 1.0)
    assert status == 1 and "dog/00003.jpg" in report["obstacles"][0]


@pytest.mark.parametrize(
    ("policy", "max_bad", "expected"), [("stop", 0.0, 1), ("skip", 0.2, 1), ("skip", 0.7, 0)]
)
def test_masks_cut_short_are_all_named(check, clips, policy, max_bad, expected):
    for name in ("ant", "bee"):
        path = clips / f"Annotations/{name}/00002.png"
        path.write_bytes(path.read_bytes()[:-20])
    status, report = check(clips, policy, max_bad)
    assert status == expected
    train = report["sources"][0]
    assert train["clips"] == 1 and not train["unreadable"]["count"]
    (note,) = [note for note in train["notes"] if "broken" in note]
    assert "2 of 3" in note and "ant/00002.png" in note and "bee/00002.png" in note
    assert bool(report["obstacles"]) == bool(expected)


def test_short_and_empty_clips_are_left_out(check, clips):
    write_clip(clips, "aaa", 8, frames=3)
    write_clip(clips, "abb", 9, empty=FRAMES)
    status, report = check(clips)
    assert status == 0
    notes = " ".join(report["sources"][0]["notes"])
    assert "shorter than 4 frames: aaa" in notes and "without a visible object" in notes
    assert report["sources"][0]["clips"] == 3


def test_duplicates_and_leakage_are_told_apart(check, clips, tmp_path, capsys):
    write_clip(clips, "copy", 0)  # of ant
    other = tmp_path / "other"
    write_clip(other, "new", 50)
    write_clip(other, "stolen", 1)  # of bee
    status, report = check(clips, eval_root=other)
    assert status == 0
    assert report["duplicates"] == ["ant (train) and copy (train): 6 of 6 frames"]
    assert report["leakage"] == ["bee (train) and stolen (evaluation): 6 of 6 frames"]
    assert "WARNING: 1 pair" in capsys.readouterr().out


def test_where_every_clip_is_broken_the_first_reason_is_told(check, clips, capsys):
    for path in clips.glob("Annotations/*/00002.png"):
        path.write_bytes(path.read_bytes()[:-20])
    status, report = check(clips)
    assert status == 1 and not report["works"] and not report["sources"]
    assert "ant/00002.png" in report["obstacles"][0]
    assert "ant/00002.png" in capsys.readouterr().out.splitlines()[-1]


def test_further_sets_are_read_and_compared_too(check, clips, tmp_path, capsys):
    other = tmp_path / "other"
    write_clip(other, "new", 50)
    write_clip(other, "stolen", 1)  # of bee
    status, report = check(clips, sets={"more": other}, sheet=tmp_path / "a.png")
    assert status == 0
    assert [found["name"] for found in report["sources"]] == [
        "train",
        "evaluation",
        "evaluation more",
    ]
    assert report["leakage"] == ["bee (train) and stolen (evaluation more): 6 of 6 frames"]
    spoil(other / "JPEGImages/new/00003.jpg")
    status, report = check(clips, sets={"more": other})
    assert status == 1 and "new/00003.jpg" in report["obstacles"][0]
    cut = other / "Annotations/new/00003.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    status, report = check(clips, sets={"more": other})
    assert status == 1 and "new/00003.png" in report["obstacles"][0]
    assert len(report["broken"]) == 1


def test_samples_are_the_same_every_time(script, check, clips):
    source = SyntheticSource(num_clips=1000, num_frames=2, size=32)
    with flagsaver.flagsaver(sample=30):
        chosen = [script.chosen(source, 1000, seed) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 30 and max(chosen[0]) > 500
    assert len(script.chosen(source, 1000, 0)) == script.RENDERED
    for name in range(10):
        write_clip(clips, f"a{name}", 20 + name, empty=name % 3)
    first, again = check(clips, sample=2)[1], check(clips, sample=2)[1]
    assert first == again
    train, evaluation = first["sources"]
    assert (train["clips_read"], train["frames_read"]) == (2, 2 * FRAMES)
    assert evaluation["clips_read"] == 1


def test_nothing_to_read_is_an_error(check, tmp_path):
    with pytest.raises(UserError, match="config.data.root"):
        check(tmp_path / "absent")


def test_a_folder_is_no_file(script, check, clips, tmp_path):
    with pytest.raises(UserError, match="--contact-sheet=.* is a folder"):
        check(clips, sheet=tmp_path)


def sheet_size(path: pathlib.Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert len(np.unique(np.asarray(image))) > 20
        return image.size


def test_the_sheet_shows_every_source(check, clips, tmp_path):
    spoil(clips / "JPEGImages/bee/00000.jpg")
    spoil(clips / "JPEGImages/bee/00003.jpg")
    status, _ = check(clips, sheet=tmp_path / "new" / "sheet.png")
    assert status == 1  # a clip that cannot be read is left out of the sheet
    width, height = sheet_size(tmp_path / "new" / "sheet.png")
    assert 1300 < width < 1700 and 600 < height < 900
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("flag", ["--contact-sheet", "--contact_sheet"])
def test_from_the_command_line(clips, tmp_path, flag):
    if flag == "--contact-sheet":
        spoil(clips / "JPEGImages/bee/00003.jpg")
    command = [sys.executable, "scripts/check_data.py", "--config=configs/default.py:nano"]
    command += [f"--config.data.root={clips}", "--config.data.num_frames=2"]
    command += ["--config.model.resolution=64", f"{flag}={tmp_path}/a.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.splitlines()[-1]
    if flag == "--contact-sheet":
        assert done.returncode == 1 and "bee/00003.jpg" in last
    else:
        assert done.returncode == 0 and last == "training would work"
    assert not done.stderr
    sheet_size(tmp_path / "a.png")


def test_real_clips(check, tmp_path):
    if not REAL.is_dir():
        pytest.skip("no real clips beside the repository")
    status, report = check(REAL / "science", sheet=tmp_path / "sheet.png")
    assert status == 0
    assert report["sources"][0]["clips_read"] == 2
    cells = report["sources"][1]["objects_per_frame"]
    assert (cells["min"], cells["max"]) == (8, 13)
    assert (tmp_path / "sheet.png").stat().st_size < 3e6
