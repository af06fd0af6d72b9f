"""Weights of all released configurations: the reference's names, shapes and bytes, both ways."""
# pyright: reportMissingImports=false

import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2

from sam2_jax import convert, weights
from sam2_jax.model.sam2 import init_params, make_sam2

VARIANTS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
VERSIONS = {"2.0": "sam2/sam2", "2.1": "sam2.1/sam2.1"}


def build(variant: str, version: str, checkpoint: str | None = None) -> torch.nn.Module:
    """The reference's model from its own yaml, as its users build it."""
    config = f"configs/{VERSIONS[version]}_hiera_{VARIANTS[variant]}.yaml"
    return build_sam2(config, checkpoint, device="cpu")


@functools.cache
def shapes(variant: str, version: str, resolution: int = 1024) -> Any:
    model = make_sam2(variant, resolution, version)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def number(arrays: dict[str, np.ndarray]) -> None:
    """Gives every element of float32 arrays bits that it shares with no other, in place."""
    start = 0
    for x in arrays.values():
        bits = np.arange(start, start + x.size, dtype=np.uint32)
        x[...] = bits.view(np.float32).reshape(x.shape)
        start += x.size


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_bytes(variant, version):
    # Views of the model's own memory: a copy of large is 900 MB
    state = {k: x.detach().numpy() for k, x in build(variant, version).state_dict().items()}
    number(state)
    like = shapes(variant, version)
    assert weights.recognise(state) == (variant, version)
    params = convert.from_reference(state, like)  # strict: names and shapes are those of `like`
    assert jax.tree.structure(params) == jax.tree.structure(like)
    jax.tree.map(lambda x, to: pytest.fail() if x.dtype != to.dtype else None, params, like)
    assert sum(x.size for x in state.values()) == sum(x.size for x in jax.tree.leaves(like))
    back = convert.to_reference(params)
    assert back.keys() == state.keys()
    for name, x in state.items():
        assert back[name].shape == x.shape and back[name].dtype == x.dtype, name
        assert np.array_equal(bits(back[name]), bits(x)), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_come_back(variant, version):
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes(variant, version))
    number(convert.flatten(params))
    back = convert.from_reference(convert.to_reference(params), params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert np.array_equal(bits(x), bits(y))


def test_files_go_both_ways(tmp_path):
    """What the reference saves is read here, what is written here the reference loads strictly."""
    theirs = build("tiny", "2.1").state_dict()
    state = {k: x.detach().numpy() for k, x in theirs.items()}
    torch.save({"model": theirs}, tmp_path / "released.pt")
    like = shapes("tiny", "2.1", 512)  # no tensor depends on the resolution
    params = weights.load(tmp_path / "released.pt", like)
    weights.write(tmp_path / "ours.pt", convert.to_reference(params))
    weights.write(tmp_path / "ours.safetensors", convert.to_reference(params))
    loaded = build("tiny", "2.1", str(tmp_path / "ours.pt")).state_dict()
    read = weights.read(tmp_path / "ours.safetensors")
    assert loaded.keys() == read.keys() == state.keys()
    for name, x in state.items():
        assert np.array_equal(bits(loaded[name].numpy()), bits(x)), name
        assert np.array_equal(bits(read[name]), bits(x)), name
