"""Files of whole models: what they hold, what is recognised in them, and what is refused."""

import functools
import os
import re
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sam2_jax import convert, weights
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError


@functools.cache
def like(variant: str = "nano", version: str = "2.1") -> Any:
    """The shapes of a model's parameters."""
    model = make_sam2(variant, 64, version)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """A random `nano` under the reference's names."""
    rng = np.random.default_rng(0)
    return {
        k: rng.normal(size=x.shape).astype(np.float32)
        for k, x in convert.hollow_reference(like()).items()
    }


@pytest.fixture(params=weights.SUFFIXES)
def path(request, tmp_path):
    """A file of each of the endings, not there yet."""
    if request.param in weights.PICKLED:
        pytest.importorskip("torch")
    return tmp_path / f"folder/weights{request.param}"


def test_what_was_written_is_read(path, state):
    path.parent.mkdir()
    other = path.with_name(f"{path.name}.tmp")
    other.write_text("somebody's")
    weights.write(path, state)
    assert other.read_text() == "somebody's"
    assert sorted(path.parent.iterdir()) == [path, other]
    (path.parent / "touched").touch()
    assert path.stat().st_mode == (path.parent / "touched").stat().st_mode
    back = weights.read(path)
    assert set(back) == set(state)
    for name, x in state.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name].view(np.uint32), x.view(np.uint32))
    hollow = weights.read(path, values=False)
    assert {k: x.shape for k, x in hollow.items()} == {k: x.shape for k, x in state.items()}
    assert all(set(x.strides) <= {0} for x in hollow.values())
    params = weights.load(path, like())
    expected = convert.from_reference(state)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert weights.recognise(back) == weights.recognise(hollow) == ("nano", "2.1")


def test_strided_and_read_only_arrays_are_written(path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    x.flags.writeable = False
    weights.write(path, {"x": x, "y": np.float64(3.0) * np.ones(2)})
    back = weights.read(path)
    np.testing.assert_array_equal(back["x"], x)
    assert back["y"].dtype == np.float32


def test_a_file_is_not_overwritten_unasked(path, state):
    weights.write(path, state)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists: .*--overwrite"):
        weights.write(path, {"x": np.zeros(1)})
    assert path.read_bytes() == before
    weights.write(path, {"x": np.zeros(1)}, overwrite=True)
    assert set(weights.read(path)) == {"x"}


def test_a_file_is_written_whole_or_not_at_all(path, state, monkeypatch):
    weights.write(path, {"x": np.zeros(1)})

    def full(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot be written.*No space left"):
        weights.write(path, state, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert set(weights.read(path)) == {"x"}


def test_a_folder_that_cannot_be_made_is_named(path):
    (path.parent).write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        weights.write(path, {"x": np.zeros(1)})


def test_unknown_endings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"ending.*\.safetensors"):
        weights.write(tmp_path / "w.bin", {})
    (tmp_path / "w.bin").touch()
    for name in ("w.bin", "nowhere.pt"):
        with pytest.raises(UserError, match=rf"{name} .*ending.*\.safetensors"):
            weights.read(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_other_floats_become_float32(tmp_path, dtype, ending):
    path = tmp_path / f"half{ending}"
    values = np.array([0.15625, -2.0, 3e4], np.float32)
    narrow = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if ending == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({"model": {"x": torch.tensor(values, dtype=getattr(torch, dtype))}}, path)
    else:
        safetensors.numpy.save_file({"x": narrow}, path)
    x = weights.read(path)["x"]
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, narrow.astype(np.float32))
    assert weights.read(path, values=False)["x"].shape == (3,)


@pytest.mark.parametrize("size", [0, 5, 2000, -30])
def test_a_file_cut_short_is_named(path, state, size):
    weights.write(path, state)
    path.write_bytes(path.read_bytes()[:size])
    for values in (True, False):
        with pytest.raises(UserError, match=rf"{path.name} \([\d,]+ bytes.*cut short.*again"):
            weights.read(path, values)


def test_what_torch_files_may_hold(tmp_path, state):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pt"
    tensors = {k: torch.from_numpy(x) for k, x in state.items()}
    # As the reference's trainer saves: optimizer, scaler and all
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    about = {"epoch": 3, "steps": {"train": 9}, "loss": {"all": {}}, "time_elapsed": 1.5}
    trained = {"model": tensors, "optimizer": optimizer.state_dict(), "scaler": scaler, **about}
    torch.save(trained, path)
    assert set(weights.read(path)) == set(state)
    torch.save(tensors, path)  # without a 'model' round them
    assert set(weights.read(path)) == set(state)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)  # as before torch 1.6
    np.testing.assert_array_equal(weights.read(path)["no_obj_ptr"], state["no_obj_ptr"])
    for wrong, text in (
        ({"epoch": 3, "state": tensors}, "no tensor: epoch; state: expected .'model'"),
        ({"model": {"x": 3}}, "no tensor: x: expected .'model'"),
        ({"model": [1]}, "no tensors but list: expected .'model'"),
        (torch.ones(2), "no tensors but Tensor"),
        ({}, "no tensors but dict"),
    ):
        torch.save(wrong, path)
        with pytest.raises(UserError, match=text):
            weights.read(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("image_encoder.blocks.0.attn.rel_pos_h", "SAM 1, another model"),
        ("image_encoder.patch_embed.proj.weight", "SAM 1, another model"),
        ("vision_encoder.layers.0.attn.qkv.weight", "SAM 1, another model"),
        ("vision_encoder.backbone.blocks.0.attn.qkv.weight", r"transformers: take sam2\.1_hiera_"),
        ("module.no_mem_embed", r"save model\.module\.state_dict"),
    ],
)
def test_other_models_are_named(path, name, text):
    weights.write(path, {name: np.zeros(2)})
    for values in (True, False):
        with pytest.raises(UserError, match=text):
            weights.read(path, values)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("variant", ["nano", "tiny", "small", "base_plus", "large"])
def test_models_are_recognised_with_tensors_missing(variant, version):
    whole = convert.hollow_reference(like(variant, version))
    assert weights.recognise(whole) == (variant, version)
    names = list(whole)
    for start in (0, 1):
        assert weights.recognise({k: whole[k] for k in names[start::2]}) == (variant, version)
    shallow = {k: x for k, x in whole.items() if not re.search(r"blocks\.\d\d", k)}
    assert weights.recognise(shallow)[0] == {"small": "tiny"}.get(variant, variant)
    altered = whole | {"image_encoder.trunk.blocks.0.norm2.weight": np.zeros(7)}
    assert weights.recognise(altered) == (variant, version)


def test_what_is_no_sam2_is_listed():
    block = "image_encoder.trunk.blocks.0.norm2.weight"
    with pytest.raises(UserError, match=r"2 tensors \(a; image_.*\) with block 0 77 wide.*nano"):
        weights.recognise({"a": np.zeros(1), block: np.zeros(77)})
    with pytest.raises(UserError, match=r"0 tensors \(\) with no block"):
        weights.recognise({})


@pytest.mark.parametrize("values", [True, False])
def test_half_a_model_is_refused(path, state, values):
    kept = dict(list(state.items())[::2])
    weights.write(path, kept)
    with pytest.raises(UserError) as error:
        weights.load(path, like(), values)
    text = str(error.value)
    assert f"{path}: the checkpoint lacks tensors of this model: image_encoder." in text
    assert "more; the file looks like nano 2.1, as it should, but is not whole" in text


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize(
    ("variant", "version"), [("nano", "2.0"), ("tiny", "2.1"), ("small", "2.0"), ("large", "2.1")]
)
def test_another_model_is_named(tmp_path, state, variant, version, values):
    path = tmp_path / "w.safetensors"
    weights.write(path, state)
    mend = "take --config=...:nano --config.model.version=2.1"
    looks = f"the file looks like nano 2.1, this config is {variant} {version}: {mend}"
    with pytest.raises(UserError, match=looks.replace(".", r"\.")):
        weights.load(path, like(variant, version), values)


def test_wrong_tensors_are_named(tmp_path, state):
    path = tmp_path / "w.safetensors"
    weights.write(path, state | {"modules.no_obj_ptr": np.zeros(1)})
    with pytest.raises(UserError, match=r"no SAM 2 has: modules\.no_obj_ptr; the file looks like"):
        weights.load(path, like())
    weights.write(path, state | {"no_obj_ptr": np.zeros((1, 3))}, overwrite=True)
    with pytest.raises(
        UserError, match=r"no_obj_ptr \(1, 3\) instead of \(1, 64\); the file looks"
    ):
        weights.load(path, like())
    point = "sam_prompt_encoder.point_embeddings.2.weight"
    weights.write(path, state | {point: np.zeros((1, 3))}, overwrite=True)
    with pytest.raises(
        UserError, match=r"point_embeddings\.2\.weight \(1, 3\) instead of \(1, 64\)"
    ):
        weights.load(path, like())
    weights.write(path, {"x": np.zeros(1)}, overwrite=True)
    with pytest.raises(UserError, match="no SAM 2 has: x; 1 tensors .* expected those of a SAM 2"):
        weights.load(path, like())
