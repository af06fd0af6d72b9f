"""Memory of a step before it is compiled: what is exact, what it follows, when it stops a run."""

import functools

import jax
import pytest

from configs import mose
from sam2_jax import compiled, memory_estimate
from sam2_jax import config as config_lib
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError


def configured(devices, changes):
    config = mose.get_config("nano")
    config.data.batch_size = devices
    config.update_from_flattened_dict(changes)
    return config_lib.finish(config)


@functools.cache
def parts_of(devices, changes):
    return compiled.make_parts(configured(devices, dict(changes)), jax.devices()[:devices])


def estimated(devices=1, **changes):
    shaping = {k: v for k, v in changes.items() if k.startswith(("model.", "mesh."))}
    parts = parts_of(devices, tuple(sorted(shaping.items())))
    config = configured(devices, changes)
    return memory_estimate.estimate(config, parts.model, parts.state, parts.mesh)


def test_state_and_clips_are_exact():
    found = estimated()
    shapes = jax.eval_shape(lambda: init_params(make_sam2("nano", 128), jax.random.key(0)))
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert found["parameters"] == parameters
    assert found["optimizer"] == pytest.approx(2 * parameters, rel=0.01)
    assert found["clips"] == 4 * 128**2 * (3 + 2)


@pytest.mark.parametrize(
    ("change", "less"),
    [
        ({"data.num_frames": 4}, {"image encoder", "memories"}),
        ({"data.max_objects": 1}, {"memories", "memory attention", "masks"}),
        ({"train.remat": "full"}, {"image encoder"}),
        ({"model.resolution": 512}, {"clips", "image features", "masks"}),
        ({"train.precision": "bfloat16"}, {"image encoder", "image features", "compute copy"}),
        ({"model.attention": "blockwise"}, {"image encoder", "memory attention"}),
    ],
)
def test_what_makes_it_less(change, less):
    whole = {
        "model.attention": "xla",
        "data.num_frames": 8,
        "data.max_objects": 3,
        "model.resolution": 1024,
    }
    before = estimated(1, **whole)
    after = estimated(1, **whole | change)
    assert {name for name in less if after[name] < before[name]} == less
    assert all(after[name] <= before[name] for name in before)


def test_a_mesh_shares_the_state():
    alone, shared = estimated(devices=4), estimated(devices=4, **{"mesh.fsdp": 4})
    assert shared["optimizer"] < 0.5 * alone["optimizer"]
    assert shared["image encoder"] == alone["image encoder"]


LONG = {"data.num_frames": 64, "data.max_objects": 3, "model.resolution": 512}
BY_FRAME = ("image features", "image encoder", "masks")


@pytest.mark.parametrize("remat", ["none", "frame", "full"])
def test_of_a_long_clip_a_segment_is_held(remat):
    """And of the whole its images and masks, and a bank for each segment."""
    policy = {"train.remat": remat}
    whole = estimated(1, **LONG | policy)
    short = estimated(1, **LONG | policy | {"data.num_frames": 8})
    found = estimated(1, **LONG | policy | {"train.segment": 8})
    assert {name: found[name] for name in BY_FRAME} == {name: short[name] for name in BY_FRAME}
    assert found["memory attention"] <= 1.1 * short["memory attention"]  # more pointers
    assert found["clips"] == whole["clips"] == 8 * short["clips"]
    one_bank = 3 * 7 * 32**2 * 32 * 4  # objects, memories, tokens, channels, bytes
    assert found["memories"] - short["memories"] == 8 * one_bank
    assert memory_estimate.total(found) < 0.5 * memory_estimate.total(whole)
    for enough in (64, 128):  # no segments
        assert estimated(1, **LONG | policy | {"train.segment": enough}) == whole


def test_a_bank_has_room_for_so_many_memories_however_long_the_clip():
    longer = LONG | {"data.num_frames": 128}
    assert estimated(1, **longer)["memories"] == 2 * estimated(1, **LONG)["memories"]


def test_devices_of_a_video_share_its_frames_and_objects():
    """8 frames on 3 devices: 3, 3 and 2; 4 objects: 2, 1 and 1."""
    clip = {"data.num_frames": 8, "data.max_objects": 4, "data.batch_size": 1}
    alone, shared = estimated(1, **clip), estimated(3, **clip | {"mesh.model": 3})
    for name in ("memories", "memory attention", "masks"):
        assert shared[name] == alone[name] // 2, name
    assert shared["image encoder"] == alone["image encoder"] // 8 * 3
    for name in ("clips", "image features", "parameters", "optimizer"):
        assert shared[name] == alone[name], name


def test_limits():
    found = {"image encoder": 10 * 2**30, "masks": 2**20}
    assert memory_estimate.check(found, None) == ""
    assert memory_estimate.check(found, 11 * 2**30) == ""
    warning = memory_estimate.check(found, 9 * 2**30)
    assert "about 10.00 GiB" in warning and "train.remat=full" in warning
    with pytest.raises(UserError, match="a device has 5.00 GiB: set train.remat"):
        memory_estimate.check(found, 5 * 2**30)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_limit_of_devices():
    assert (
        memory_estimate.device_limit([Device({"bytes_limit": 5}), Device({"bytes_limit": 4})]) == 4
    )
    assert memory_estimate.device_limit([Device(None)]) is None
    assert memory_estimate.device_limit(jax.devices()) is None  # a CPU does not tell
