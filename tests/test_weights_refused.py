"""Files of weights that are refused: with code, damaged, or of what has no plain values."""

import os
import pickle
import sys

import numpy as np
import pytest
import safetensors.numpy

from sam2_jax import weights
from sam2_jax.types import UserError


def test_other_types_are_refused(tmp_path):
    safetensors.numpy.save_file({"q.weight": np.ones(3, np.int8)}, tmp_path / "q.safetensors")
    with pytest.raises(UserError, match=r"q\.weight of type I8: expected float16"):
        weights.read(tmp_path / "q.safetensors")
    torch = pytest.importorskip("torch")
    torch.save({"model": {"q.weight": torch.ones(3, dtype=torch.int8)}}, tmp_path / "q.pt")
    with pytest.raises(UserError, match=r"q\.weight of type int8: expected float16"):
        weights.read(tmp_path / "q.pt")


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float32 sparse_coo", "float32 meta"])
@pytest.mark.parametrize("values", [True, False])
def test_tensors_without_plain_values_are_refused(tmp_path, kind, values):
    torch = pytest.importorskip("torch")
    x = {
        "float8_e4m3fn": torch.ones(3).to(torch.float8_e4m3fn),
        "float32 sparse_coo": torch.ones(3).to_sparse(),
        "float32 meta": torch.ones(3, device="meta"),
    }[kind]
    torch.save({"model": {"q.weight": x}}, tmp_path / "q.pt")
    with pytest.raises(UserError, match=rf"q\.weight of type {kind}: expected float16"):
        weights.read(tmp_path / "q.pt", values)


@pytest.mark.parametrize("ending", weights.SUFFIXES)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "pointer of Git LFS"),
        (b"\n<!doctype html>", "is a web page"),
    ],
)
def test_what_a_download_left_is_named(tmp_path, ending, content, text):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=text):
        weights.read(path)


def test_damaged_values_are_noticed(tmp_path):
    """PyTorch writes sums into its files, and does not look at them."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save({"model": {"x": torch.arange(10_000.0), "y": torch.ones(3)}}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt is damaged: x/data/0 in it is not what was saved"):
        weights.read(path)


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_is_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": Code(tmp_path / "run")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt .*holds code, which is not run, or"):
        weights.read(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Code(tmp_path / "run")}))
    with pytest.raises(UserError, match=r"plain\.pt .*holds code, which is not run, or.*not trust"):
        weights.read(tmp_path / "plain.pt")
    assert not (tmp_path / "run").exists()
    # The proof that the files would have done so
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "run").exists()


def test_torch_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "official.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"official\.pt needs PyTorch: pip install .*\[torch\]"):
        weights.read(tmp_path / "official.pt")
    with pytest.raises(UserError, match=r"\[torch\]"):
        weights.write(tmp_path / "mine.pt", {})
    assert not (tmp_path / "mine.pt.tmp").exists()


def test_a_torch_that_may_run_code_is_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "w.pt")
    for version in ("2.5.1+cpu", "1.13"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(UserError, match=r"w\.pt needs a newer PyTorch"):
            weights.read(tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    weights.read(tmp_path / "w.pt")
