"""scripts/convert_checkpoint.py: any of three formats to any other, exactly."""

import importlib.util
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sam2_jax import checkpoint, convert, initial, weights
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
NAMES = ["tiny.pt", "tiny.safetensors", "sam2.1_tiny"]  # a folder's name may have a dot in it


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPT.with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("convert_checkpoint")


@pytest.fixture(scope="module")
def params() -> Any:
    """A random `nano` of version 2.0."""
    model = make_sam2("nano", 64, "2.0")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory) -> pathlib.Path:
    """A run whose last step, 3, has these parameters."""
    path = tmp_path_factory.mktemp("run")
    model = {"variant": "nano", "resolution": 96, "version": "2.0", "dropout": 0.1}
    (path / "config.json").write_text(json.dumps({"model": model}))
    for step in (3, 2):
        with ocp.StandardCheckpointer() as checkpointer:
            scaled = jax.tree.map(lambda x, step=step: x * np.float32(step / 3), params)
            checkpointer.save(path / "checkpoints" / str(step) / "params", scaled)
    return path


@pytest.fixture(scope="module")
def source(workdir, params, tmp_path_factory):
    """A function name -> these parameters in that format, written without the script."""

    def find(name: str) -> pathlib.Path:
        if name.endswith(".pt"):
            pytest.importorskip("torch")
        if name not in weights_of:
            weights_of[name] = tmp_path_factory.mktemp("in") / name
            weights.write(weights_of[name], convert.to_reference(params))
        return weights_of[name]

    weights_of = {NAMES[2]: workdir}
    return find


def run(script, source, output, *flags) -> None:
    script.main([f"--src={source}", f"--dst={output}", *flags])


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("from_", NAMES)
def test_any_format_to_any_other(script, source, params, tmp_path, capsys, from_, to):
    if to.endswith(".pt"):
        pytest.importorskip("torch")
    output = tmp_path / "new" / to
    run(script, source(from_), output)
    assert [p.name for p in output.parent.iterdir()] == [to]
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    names = convert.to_reference(params)
    total = sum(x.size for x in names.values())
    end = f": nano 2.0, {len(names)} tensors, {total:,} parameters -> {output}\n"
    assert printed == f"{initial.find_params(source(from_))}{end}"
    like = jax.eval_shape(lambda: params)
    loaded = initial.load_init(output, like)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    if output.is_dir():
        model = json.loads((output / "config.json").read_text())["model"]
        resolution = 96 if source(from_).is_dir() else 1024
        assert model == {"variant": "nano", "version": "2.0", "resolution": resolution}


def test_a_flipped_bit_in_a_folder_is_noticed(script, source, tmp_path):
    run(script, source("tiny.safetensors"), tmp_path / "out")
    largest = max((tmp_path / "out/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="out/params cannot be restored.*not the values"):
        run(script, tmp_path / "out", tmp_path / "again.safetensors")


def test_a_folder_can_be_evaluated(script, source, params, tmp_path):
    run(script, source("tiny.safetensors"), tmp_path / "out", "--resolution=128")
    evaluate = load_script("evaluate")
    for path in (tmp_path / "out", tmp_path / "out/params"):
        model, loaded = evaluate.load(path)
        assert model == make_sam2("nano", 128, "2.0")
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_lone_folder_of_parameters(script, workdir, tmp_path):
    lone = tmp_path / "elsewhere"
    lone.mkdir()
    (lone / "config.json").write_text('{"model": 3}')
    (lone / "params").symlink_to(workdir / "checkpoints/2/params")
    run(script, lone, tmp_path / "out")
    assert initial.identify(tmp_path / "out/params") == ("nano", "2.0")


def test_what_exists_is_not_overwritten_unasked(script, source, workdir, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    for output in (folder, file):
        run(script, workdir, output)
        with pytest.raises(UserError, match=f"--dst={output} exists"):
            run(script, workdir / "checkpoints/2", output)
        run(script, workdir / "checkpoints/2", output, "--overwrite")
        (x,) = (x for k, x in weights_in(output).items() if k.endswith("no_obj_ptr"))
        (y,) = (x for k, x in weights_in(workdir).items() if k.endswith("no_obj_ptr"))
        np.testing.assert_allclose(x, y * 2 / 3, rtol=1e-6)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"folder", output.name})


def weights_in(path: pathlib.Path) -> dict[str, np.ndarray]:
    like = jax.eval_shape(lambda: init_params(make_sam2("nano", 64, "2.0"), jax.random.key(0)))
    return convert.to_reference(jax.device_get(initial.load_init(path, like)))


def test_a_run_is_never_overwritten(script, source, workdir):
    with pytest.raises(UserError, match="also holds checkpoints: only a folder that this script"):
        run(script, source("tiny.safetensors"), workdir, "--overwrite")
    assert checkpoint.latest_step(workdir) == 3


def test_a_folder_is_written_whole_or_not_at_all(script, workdir, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    run(script, workdir, folder)
    before, replace = sorted(folder.rglob("*")), os.replace

    def fails_last(a, b):
        if pathlib.Path(a).name == "new":
            raise OSError("No space left on device")
        replace(a, b)

    monkeypatch.setattr(script.os, "replace", fails_last)
    with pytest.raises(UserError, match="cannot be written.*No space"):
        run(script, workdir / "checkpoints/2", folder, "--overwrite")
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("output", "flags", "text"),
    [
        ("out.onnx", [], r"'\.onnx' is unknown: expected \.pt, \.pth, \.safetensors, or no suffix"),
        ("out.safetensors", ["--resolution=64"], "--resolution=64 is for folders"),
        ("out", ["--resolution=65"], "resolution 65 is not a positive multiple of 32"),
        ("a-file", ["--overwrite"], "a-file is a file, in place of which"),
        ("a-folder.pt", ["--overwrite"], r"a-folder\.pt is a folder, in place of which"),
    ],
)
def test_impossible_outputs_are_named(script, workdir, tmp_path, output, flags, text):
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder.pt").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=text):
        run(script, workdir, tmp_path / output, *flags)
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_without_room_or_with_too_long_a_name(script, workdir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        run(script, workdir, tmp_path / ("x" * 300))
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(UserError, match=r"out needs [\d.]+ M.?B: there are .* left"):
        run(script, workdir, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("resolution", ["null", '"abc"', "true"])
def test_a_config_without_a_resolution_is_named(script, workdir, tmp_path, resolution):
    lone = tmp_path / "elsewhere"
    lone.mkdir()
    (lone / "config.json").write_text(f'{{"model": {{"resolution": {resolution}}}}}')
    shutil.copytree(workdir / "checkpoints/2/params", lone / "params")
    with pytest.raises(UserError, match=r"config\.json: model\.resolution is .*--resolution"):
        run(script, lone, tmp_path / "out")
    run(script, lone, tmp_path / "out", "--resolution=64")


def test_what_is_no_whole_model_is_named(script, params, tmp_path):
    with pytest.raises(UserError, match="--src=.*nowhere does not exist"):
        run(script, tmp_path / "nowhere", tmp_path / "out")
    path = tmp_path / "whole.safetensors"
    weights.write(path, convert.to_reference(params))
    with pytest.raises(UserError, match=r"--variant=tiny: .*whole\.safetensors is nano 2\.0"):
        run(script, path, tmp_path / "out", "--variant=tiny")
    path = tmp_path / "half.safetensors"
    weights.write(path, dict(list(convert.to_reference(params).items())[::2]))
    with pytest.raises(UserError, match=r"half\.safetensors: .*lacks.*looks like nano 2\.0"):
        run(script, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def call(*flags: object) -> subprocess.CompletedProcess:
    """The script as a process of its own."""
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_wrong_flag_is_one_line_and_help_shows_examples():
    done = call("--src=x", "--out=y")
    assert done.returncode == 2
    assert done.stderr == "error: the following arguments are required: --dst\n"
    done = call("--help")
    assert done.returncode == 0
    assert "--src=sam2.1_hiera_tiny.pt --dst=tiny\n" in done.stdout


class Code:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("run",)


def test_a_file_with_code_is_one_line(tmp_path, monkeypatch):
    """Torch warns of such a file on lines of its own."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Code()}, protocol=4))
    done = call("--src=evil.pt", "--dst=out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: evil.pt (") and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pt"]
