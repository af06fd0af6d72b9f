"""Arguments after the colon of --config: variant and memory of a device."""

import pytest

from configs import mixture, mose
from sam2_jax import config as config_lib
from sam2_jax import presets
from sam2_jax.config_checks import REMATS
from sam2_jax.types import UserError


def test_arguments():
    assert presets.parse("") == ("", None)
    assert presets.parse("large") == ("large", None)
    assert presets.parse("large,gpu=24") == ("large", 24)
    assert presets.parse("gpu=24") == ("", 24)
    assert mose.get_config("gpu=80").model.variant == "base_plus"  # of that file


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("tiny,gpus=24", "no argument 'gpus=24'; there are a variant .*nano.* gpu=GB"),
        ("tiny,small", "no argument 'small'"),
        ("tiny,gpu=20", "gpu=20 must be one of 8, 12, 16, 24, 40, 48, 80"),
        ("tiny,gpu=", "gpu= must be one of"),
        ("tin,gpu=24", "did you mean 'tiny'"),
    ],
)
def test_wrong_arguments(argument, words):
    with pytest.raises(UserError, match=words):
        presets.parse(argument)
    with pytest.raises(UserError, match=words):
        config_lib.load_file(f"configs/mose.py:{argument}")


@pytest.mark.parametrize("variant", presets.FITS)
def test_more_memory_never_takes_more_away(variant):
    ladder = [presets.FITS[variant][gpu] for gpu in sorted(presets.FITS[variant])]
    assert set(presets.FITS[variant]) <= set(presets.SIZES)
    recomputed = [REMATS.index(remat) for remat in ladder]
    assert recomputed == sorted(recomputed, reverse=True)


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="gpu=8: large takes at least 24 GB"):
        mose.get_config("large,gpu=8")
    assert mose.get_config("nano,gpu=8").to_dict() == mose.get_config("nano").to_dict()


def test_nothing_else_of_a_config_changes():
    config, whole = mixture.get_config("base_plus,gpu=8"), mixture.get_config("base_plus")
    assert (config.train.remat, whole.train.remat) == ("full", "frame")
    whole.train.remat = "full"
    assert config.to_dict() == whole.to_dict()


def test_what_is_set_afterwards_wins():
    """What is set on the command line is set after what the memory asks for."""
    config = mose.get_config("base_plus,gpu=8")
    config.train.remat = "none"
    assert config_lib.finish(config).train.remat == "none"
