"""Memory of a step before it is compiled: what is exact, what it follows, when it stops a run."""

import jax
import pytest

from configs import mose
from sam2_jax import compiled, memory_estimate
from sam2_jax import config as config_lib
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError


def estimated(devices=1, **changes):
    config = mose.get_config("nano")
    config.data.batch_size = devices
    config.update_from_flattened_dict(changes)
    config = config_lib.finish(config)
    parts = compiled.make_parts(config, jax.devices()[:devices])
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
