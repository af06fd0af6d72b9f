"""Names and layouts of the reference's tensors, without the reference: see also tests/parity."""

import jax
import numpy as np
import pytest

from sam2_jax import convert
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError


@pytest.fixture(scope="module")
def params():
    return jax.device_get(init_params(make_sam2("nano", 64), jax.random.key(0)))


@pytest.fixture
def state(params):
    return convert.to_reference(params)


def test_round_trip_is_exact(params, state):
    back = convert.from_reference(state, params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_no_two_tensors_share_a_name(params, state):
    assert len(state) == len(jax.tree.leaves(params)) + 3  # four point embeddings are one of ours
    assert sum(x.size for x in state.values()) == sum(x.size for x in jax.tree.leaves(params))


def test_layouts(params, state):
    block = params["image_encoder"]["trunk"]["blocks_1"]["attn"]["qkv"]
    name = "image_encoder.trunk.blocks.1.attn.qkv"
    np.testing.assert_array_equal(state[f"{name}.weight"], block["kernel"].T)
    kernel = params["image_encoder"]["trunk"]["patch_embed"]["kernel"]  # rows, columns, in, out
    theirs = state["image_encoder.trunk.patch_embed.proj.weight"]  # out, in, rows, columns
    np.testing.assert_array_equal(theirs[5, 2], kernel[:, :, 2, 5])
    kernel = params["sam_mask_decoder"]["upscale_0"]["kernel"]  # in, rows, columns, out
    theirs = state["sam_mask_decoder.output_upscaling.0.weight"]  # in, out, rows, columns
    np.testing.assert_array_equal(theirs[3, 5], kernel[3, :, :, 5])
    depthwise = state["memory_encoder.fuser.layers.1.dwconv.weight"]
    ours = params["memory_encoder"]["fuser_layers_1"]["dwconv_kernel"]
    np.testing.assert_array_equal(depthwise[3, 0], ours[:, :, 0, 3])
    assert depthwise.shape == (params["no_mem_embed"].size, 1, 7, 7)


def test_missing_tensor_is_named(params, state):
    del state["no_obj_ptr"]
    with pytest.raises(UserError, match="lacks.*no_obj_ptr"):
        convert.from_reference(state, params)


def test_unknown_tensor_is_named(state):
    state["image_encoder.trunk.blocks.0.attn.key.weight"] = np.zeros((2, 2))
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.key\.weight"):
        convert.from_reference(state)


def test_tensor_of_another_version_is_named(params, state):
    older = dict(params)
    del older["no_obj_embed_spatial"]
    with pytest.raises(UserError, match="this model has not.*no_obj_embed_spatial"):
        convert.from_reference(state, older)


def test_misshapen_tensors_are_named(params, state):
    wrong = state | {"no_obj_ptr": np.zeros((1, 3), np.float32)}
    with pytest.raises(
        UserError, match=r"other shapes .*: no_obj_ptr \(1, 3\) instead of \(1, 64\)"
    ):
        convert.from_reference(wrong, params)
    wrong = state | {"no_obj_ptr": np.zeros(64, np.float32)}
    with pytest.raises(UserError, match=r"no_obj_ptr has shape \(64,\)"):
        convert.from_reference(wrong)


def test_unknown_parameter_is_named():
    with pytest.raises(UserError, match="mask_downsample/scale"):
        convert.to_reference({"mask_downsample": {"scale": np.zeros(1)}})
