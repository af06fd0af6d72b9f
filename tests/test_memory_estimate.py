"""Memory of a step before it is compiled: what is exact, what it follows, when it stops a run."""

import functools

import jax
import pytest

from configs import mixture, mose
from sam2_jax import compiled, memory_estimate
from sam2_jax import config as config_lib
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.model.variants import VARIANTS
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
    return memory_estimate.estimate(config, parts.state, parts.mesh)


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
        ({"data.max_objects": 1}, {"memories", "visits", "masks"}),
        ({"train.remat": "full"}, {"image encoder"}),
        ({"model.resolution": 512}, {"clips", "image features", "masks"}),
        ({"train.precision": "bfloat16"}, {"image encoder", "image features", "compute copy"}),
        ({"model.attention": "blockwise"}, {"image encoder", "visits"}),
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


IMAGES = {"data.num_frames": 1, "data.max_objects": 8, "model.resolution": 1024}


def test_images_have_no_memories():
    """Nor is attention to them paid for, whatever it takes."""
    found = estimated(1, **IMAGES)
    assert found["memories"] == 0
    clip = IMAGES | {"data.num_frames": 2}
    for attention, same in [(IMAGES, True), (clip, False)]:
        plain, blockwise = (
            estimated(1, **attention | {"model.attention": name})["visits"]
            for name in ("xla", "blockwise")
        )
        assert (plain == blockwise) == same


def test_of_images_two_passes_of_the_decoder_are_held():
    """The first, and the one after a click, for each object."""
    found, once = (estimated(1, **IMAGES | {"prompts.corrections": n}) for n in (7, 0))
    one_pass = 64**2 * 64 * 40 * 4  # tokens, channels, arrays, bytes
    assert (found["visits"], once["visits"]) == (8 * 2 * one_pass, 8 * one_pass)


def test_visits_that_are_not_computed_again_are_held():
    masks = LONG | {"prompts.prob_points": 0.0}  # no passes after clicks
    policies = (masks | {"train.remat": remat} for remat in ("none", "frame"))
    kept, again = (estimated(1, **policy)["visits"] for policy in policies)
    nano, tokens = VARIANTS["nano"], 32**2
    decoded, made = 40 * 64, 80 * 64  # arrays, channels
    layer = 12 * 64 + 2 * nano.feedforward_dim
    remembering = nano.memory_layers * layer
    visit = decoded + made + remembering
    last = max(remembering, decoded)  # of those that are, one at a time
    assert kept - again == 3 * tokens * 4 * (64 * visit - last)  # objects, bytes


@pytest.mark.parametrize(("objects", "heaviest"), [(2, "sav"), (64, "sa1b")])
def test_a_mixture_takes_what_its_heaviest_source_takes(objects, heaviest):
    config = mixture.get_config("nano")
    config.data.mixture.sa1b.max_objects = objects
    found = memory_estimate.unsharded(config)
    alone = {}
    for name in ("sav", "sa1b"):
        single = mixture.get_config("nano")
        single.data.mixture.sa1b.max_objects = objects
        del single.data.mixture["sa1b" if name == "sav" else "sav"]
        alone[name] = memory_estimate.unsharded(single)
    other = alone["sa1b" if heaviest == "sav" else "sav"]
    assert found == alone[heaviest]
    assert memory_estimate.total(found) > memory_estimate.total(other)
    name, source = memory_estimate.heaviest_source(config)
    assert name == heaviest and source is config.data.mixture[heaviest]


def test_whole_parameters_and_their_moments():
    """What is said of a config alone is what is said of its state on one device."""
    state = estimated(1)
    found = memory_estimate.unsharded(configured(1, {}))
    assert found.pop("optimizer") == pytest.approx(state.pop("optimizer"), rel=0.01)
    assert found == state
    averaged = memory_estimate.unsharded(configured(1, {"train.ema_decay": 0.9}))
    assert averaged["moving_average"] == found["parameters"]


def test_devices_are_dealt_a_part_of_a_batch_each():
    config = configured(8, {})
    alone, shared = (memory_estimate.unsharded(config, devices) for devices in (1, 8))
    assert shared["clips"] == alone["clips"] // 8
    assert shared["parameters"] == alone["parameters"]


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
    assert found["visits"] <= 1.1 * short["visits"]  # more pointers
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
    for name in ("memories", "visits", "masks"):
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
