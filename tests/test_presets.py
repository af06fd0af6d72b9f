"""Arguments after the colon of --config: variant and memory of a device."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import mixture, mose
from sam2_jax import config as config_lib
from sam2_jax import memory_estimate, presets
from sam2_jax.config_checks import REMATS
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def test_arguments():
    assert presets.parse("") == ("", None)
    assert presets.parse("large") == ("large", None)
    assert presets.parse("large,gpu=24") == ("large", presets.Machine(24))
    assert presets.parse("gpu=24") == ("", presets.Machine(24))
    assert presets.parse("tiny,gpu=16x8") == ("tiny", presets.Machine(8, devices=16))
    assert mose.get_config("gpu=80").model.variant == "base_plus"  # of that file


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("tiny,gpus=24", "no argument 'gpus=24'; there are a variant .*nano.* gpu=GB"),
        ("tiny,small", "no argument 'small'"),
        ("tiny,gpu=20", "gpu=20 must be one of 8, 12, 16, 24, 40, 48, 80"),
        ("tiny,gpu=", "gpu= must be one of"),
        ("tiny,gpu=0x24", "gpu=0x24 must be one of .*as 8x24, a number of such devices"),
        ("tiny,gpu=8x", "gpu=8x must be one of"),
        ("tin,gpu=24", "did you mean 'tiny'"),
    ],
)
def test_wrong_arguments(argument, words):
    with pytest.raises(UserError, match=words):
        presets.parse(argument)
    with pytest.raises(UserError, match=words):
        config_lib.load_file(f"configs/mose.py:{argument}")


@pytest.mark.parametrize("variant", ["tiny", "small", "base_plus", "large"])
@pytest.mark.parametrize("name", NAMES)
def test_every_config_fits_or_says_what_it_takes(name, variant):
    """By the estimate; and with more memory no more is computed again, nor in more parts."""
    before = None
    for size in presets.SIZES:
        try:
            config = config_lib.load_file(f"configs/{name}.py:{variant},gpu={size}")
        except UserError as error:
            assert before is None  # nothing smaller fits
            found = re.match(rf"gpu={size}: {variant} takes about ([\d.]+) GB", str(error))
            assert found and float(found[1]) >= size, error
            continue
        assert memory_estimate.total(memory_estimate.unsharded(config)) <= size * 10**9
        train = config.train
        for source in memory_estimate.sources(config).values():
            assert source.batch_size % train.accumulate == 0
        taken = (REMATS.index(train.remat), train.accumulate)
        assert before is None or taken <= before
        before = taken


def test_a_batch_is_worked_off_in_the_fewest_parts_that_fit():
    config = mose.get_config("base_plus,gpu=24")  # of eight videos
    assert (config.train.remat, config.train.accumulate) == ("full", 2)
    config.train.accumulate = 1
    needed = memory_estimate.total(memory_estimate.unsharded(config))
    assert needed > presets.SHARE * 24 * 10**9
    config.train.remat, config.train.accumulate = "frame", 8
    needed = memory_estimate.total(memory_estimate.unsharded(config))
    assert needed > presets.SHARE * 24 * 10**9


def test_each_of_several_devices_is_dealt_a_part_of_the_batch():
    alone, eight = mose.get_config("base_plus,gpu=40"), mose.get_config("base_plus,gpu=8x40")
    assert (alone.train.remat, alone.train.accumulate) == ("frame", 8)
    assert (eight.train.remat, eight.train.accumulate) == ("frame", 1)
    assert mose.get_config("base_plus,gpu=2x40").train.accumulate == 4


def test_sources_of_a_mixture_are_worked_off_in_equal_parts():
    config = mixture.get_config("tiny")
    config.data.mixture.sav.batch_size, config.data.mixture.sa1b.batch_size = 12, 8
    presets.fit(config, presets.Machine(40))
    assert config.train.accumulate == 4  # 12 and 8 have no larger divisor


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError) as error:
        mose.get_config("large,gpu=8")
    text = str(error.value)
    assert re.match(r"gpu=8: large takes about 12\.\d GB a device .*image encoder 6\.\d", text)
    assert "set train.remat=full and train.accumulate=8, and lower model.resolution, " in text
    assert text.endswith(
        "data.max_objects or data.num_frames, or set train.segment; or take a smaller variant"
    )
    with pytest.raises(UserError, match="^gpu=8x12: large takes about 12.5 GB"):
        mose.get_config("large,gpu=8x12")
    with pytest.raises(UserError, match=r"model.resolution, data.mixture.sa1b.max_objects$"):
        mixture.get_config("tiny,gpu=8")


def test_what_is_said_to_be_lowered_helps():
    config = mixture.get_config("tiny")
    config.data.mixture.sa1b.max_objects = 8
    presets.fit(config, presets.Machine(8))
    assert config.train.remat == "full"


def test_nothing_else_of_a_config_changes():
    config, whole = mose.get_config("base_plus,gpu=8"), mose.get_config("base_plus")
    assert (whole.train.remat, whole.train.accumulate) == ("frame", 1)
    whole.train.remat, whole.train.accumulate = "full", 8
    assert config.to_dict() == whole.to_dict()


def test_the_command_line_wins_and_no_device_is_asked():
    """Processes of a run must have met before one of them asks for its devices."""
    code = """import jax
from sam2_jax import config
def main(c):
    jax.config.update("jax_num_cpu_devices", 3)  # an error where devices are known already
    print(c.train.remat, c.train.accumulate, jax.device_count())
config.run(main)"""
    given = ["--config=configs/mose.py:tiny,gpu=24", "--config.train.accumulate=2"]
    command = [sys.executable, "-c", code, *given]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.split() == ["frame", "2", "3"], done.stderr
