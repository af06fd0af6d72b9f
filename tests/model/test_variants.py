"""Sizes: parameter counts of every variant, and what cannot be built."""

import jax
import pytest

from sam2_jax.model.sam2 import VERSIONS, make_sam2
from sam2_jax.model.variants import VARIANTS
from sam2_jax.types import UserError

# facebookresearch/sam2@2b90b9f, torch's count of parameters (the Gaussian matrix is a buffer)
REFERENCE_COUNTS = {
    "tiny": 38_962_498,
    "small": 46_060_354,
    "base_plus": 80_850_178,
    "large": 224_446_642,
}
ONLY_IN_21 = 16_512


def shapes(name: str, version: str = "2.1") -> dict:
    model = make_sam2(name, 64, version)
    return jax.eval_shape(lambda k: model.init(k, method="touch_everything"), jax.random.key(0))[
        "params"
    ]


def count(name: str, version: str) -> int:
    params = dict(shapes(name, version))
    encoder = dict(params.pop("sam_prompt_encoder"))
    encoder.pop("gaussian")
    return sum(leaf.size for leaf in jax.tree.leaves((params, encoder)))


@pytest.mark.parametrize("name", REFERENCE_COUNTS)
def test_parameter_counts_are_the_reference_s(name):
    assert count(name, "2.1") == REFERENCE_COUNTS[name]
    assert count(name, "2.0") == REFERENCE_COUNTS[name] - ONLY_IN_21


def test_nano_is_small_and_has_all_parts():
    assert count("nano", "2.1") <= 1_500_000
    assert set(shapes("nano")) == set(shapes("tiny"))


def test_unknown_variant_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'base_plus'"):
        make_sam2("base+", 64)
    assert set(VARIANTS) == {"nano", *REFERENCE_COUNTS}


@pytest.mark.parametrize("resolution", [0, -32, 100, 1000])
def test_resolution_must_be_a_multiple_of_32(resolution):
    with pytest.raises(UserError, match=f"model.resolution {resolution} "):
        make_sam2("nano", resolution)


def test_unknown_version():
    with pytest.raises(UserError, match="model.version '3'"):
        make_sam2("nano", 64, "3")
    assert VERSIONS == ("2.0", "2.1")
