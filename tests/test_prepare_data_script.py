"""scripts/prepare_data.py: what it packs, what it prints, what it refuses."""

import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs import default
from sam2_jax.data import catalogue
from sam2_jax.data.packed import open_packed
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "prepare_script", ROOT / "scripts/prepare_data.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags.FLAGS.mark_as_parsed()
    yield module
    flags.FLAGS.unparse_flags()


@pytest.fixture
def clips(tmp_path) -> pathlib.Path:
    """A flat folder of ten clips."""
    root = tmp_path / "flat"
    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / name).mkdir(parents=True)
        for t in range(5):
            pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"JPEGImages/{name}/{t:05d}.jpg")
            labels = np.zeros((20, 30), np.uint8)
            labels[t : t + 9, 3:20] = 1 + t % 2
            image = Image.fromarray(labels)
            image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
            image.save(root / f"Annotations/{name}/{t:05d}.png")
    return root


def small(root: pathlib.Path) -> Any:
    c = default.get_config("nano")
    default.plain(c.data)
    c.model.resolution = 32
    c.data.root = str(root)
    c.data.num_frames, c.data.max_objects, c.data.batch_size = 3, 2, 2
    return c


def batches(config: Any, count: int = 6) -> list:
    loader = catalogue.make_train_loader(config, catalogue.make_parts(config))
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def set_key(config: Any, key: str, value: str) -> None:
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def printed_flags(text: str) -> dict[str, str]:
    """What a user would copy from the end of the output."""
    given = [f for f in text[text.index("done:") :].split() if f.startswith("--config.")]
    return dict(flag.removeprefix("--config.").split("=", 1) for flag in given)


def assert_equal(one: list, two: list) -> None:
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_training_from_what_is_printed_is_the_same(script, clips, tmp_path, capsys):
    expected = batches(small(clips))
    with flagsaver.flagsaver(output=str(tmp_path / "out"), workers=1, chunk_frames=2):
        script.main(small(clips))
    config, given = small(clips), printed_flags(capsys.readouterr().out)
    assert given["data.eval_root"] == str(tmp_path / "out/evaluation")
    for key, value in given.items():
        set_key(config, key, value)
    assert config.data.source == "packed"
    assert_equal(expected, batches(config))


def test_held_out_clips_are_packed_apart(script, clips, tmp_path, capsys):
    with flagsaver.flagsaver(output=str(tmp_path / "out"), workers=1):
        script.main(small(clips))
    trained, evaluated = open_packed(tmp_path / "out"), open_packed(tmp_path / "out/evaluation")
    assert [trained.video(i).name for i in range(len(trained))] == list("abcdefghi")
    assert [evaluated.video(i).name for i in range(len(evaluated))] == ["j"]
    original = catalogue.make_eval_source(small(clips))
    assert original
    for one, two in zip(
        original.read(0, range(5), [2, 1]), evaluated.read(0, range(5), [2, 1]), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_mixture(script, clips, tmp_path, capsys):
    def mixture() -> Any:
        config = small(clips)
        for name in ("one", "two"):
            entry = config.data.mixture[name] = default.source()
            default.plain(entry)
            entry.root, entry.num_frames, entry.max_objects = str(clips), 2, 2
        config.data.mixture.two.include = str(tmp_path / "list.txt")
        config.data.root = ""
        return config

    (tmp_path / "list.txt").write_text("c\nd\n")
    expected = batches(mixture())
    with flagsaver.flagsaver(output=str(tmp_path / "out"), workers=1):
        script.main(mixture())
        config, given = mixture(), printed_flags(capsys.readouterr().out)
        assert given["data.mixture.two.root"] == str(tmp_path / "out/two")
        assert given["data.mixture.two.include"] == ""
        for key, value in given.items():
            set_key(config, key, value)
        assert_equal(expected, batches(config))
        with flagsaver.flagsaver(verify=True):
            script.main(config)
        assert "verified" in capsys.readouterr().out
        taken = mixture()
        taken.data.mixture.evaluation = default.source()
        with pytest.raises(UserError, match="data.mixture.evaluation: that name is kept"):
            script.main(taken)


def test_what_is_drawn_while_training_may_change(script, clips, tmp_path, capsys):
    with flagsaver.flagsaver(output=str(tmp_path / "out"), workers=1):
        script.main(small(clips))
        config = small(clips)
        config.data.num_frames, config.data.max_stride, config.data.augment.hflip = 2, 3, 0.0
        assert "already packed" not in capsys.readouterr().out
        script.main(config)  # nothing to do
        assert f"{tmp_path}/out: already packed, not read again" in capsys.readouterr().out
        config.data.folder.single_object = True
        with pytest.raises(UserError, match="with folder.single_object false, now it is true"):
            script.main(config)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "--output=DIR is missing"),
        ({"output": "x", "chunk_frames": 0}, "--chunk_frames=0 must be at least 1"),
        ({"output": "x", "workers": -1}, "--workers=-1 must be at least 0"),
        ({"output": "x", "shard_mb": 0}, "--shard_mb=0 must be at least 1"),
        ({"output": "nowhere", "verify": True}, "--output=nowhere holds no index.json"),
        ({"output": "flat"}, "flat is where the data are"),
    ],
)
def test_impossible_flags(script, clips, tmp_path, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=told):
        script.main(small(clips))


def test_on_the_command_line(clips, tmp_path):
    command = [sys.executable, "scripts/prepare_data.py", "--config=configs/davis.py:nano"]
    command += [f"--config.data.root={clips}", f"--output={tmp_path / 'out'}", "--workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "9 clips, 45 frames" in done.stdout
    assert "9/9" in done.stderr and "clip/s" in done.stderr and "MB/s" in done.stderr
    shard = sorted((tmp_path / "out").glob("clips-*"))[-1]
    data = bytearray(shard.read_bytes())
    data[40_000] ^= 1
    shard.write_bytes(data)
    done = subprocess.run([*command, "--verify"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 9 shards are broken") and shard.name in error
