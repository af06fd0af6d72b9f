"""Losses of clips tracked in segments, and by several devices, are those of the whole clip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sam2_jax import losses, objective, partition, prompts, sharding
from sam2_jax.encode import Shared
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import Batch

SIDE, FRAMES, OBJECTS = 64, 4, 3  # two devices cannot share three objects evenly
KEY = jax.random.key(3)
# Of the gradient's norm; float32 sums in another order, through four frames
CLOSE = 1e-4
LEARNT = ("memory_encoder/out_proj/", "maskmem_tpos_enc", "image_encoder/neck/convs_1/")


@pytest.fixture(scope="module")
def model():
    return make_sam2("nano", SIDE)


@pytest.fixture(scope="module")
def params(model):
    # Where no ReLU or maximum is so near to a tie that rounding decides it: gradients would jump
    rng = np.random.default_rng(1)
    start = init_params(model, jax.random.key(0))
    return jax.tree.map(
        lambda x: np.asarray(x + 0.05 * rng.standard_normal(x.shape), np.float32), start
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (1, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.zeros((1, FRAMES, OBJECTS, SIDE, SIDE), bool)
    for t, o in np.ndindex(FRAMES, OBJECTS):
        masks[0, t, o, 4 + 20 * o + t : 20 + 20 * o + t, 6 + 2 * t : 30 + 2 * t] = True
    return Batch(images, masks, np.ones((1, OBJECTS), bool))


def value_and_grad(model, params, batch, **how):
    """Loss, and the gradient of few parameters: those that only a memory's gradient reaches."""
    loss_fn = objective.make_loss(model, losses.REFERENCE_WEIGHTS, "none", 1, False, **how)
    learnt, others = partition.split(params, lambda path: path.startswith(LEARNT))

    def loss(learnt, batch):
        whole = partition.join(others, learnt)
        plan = prompts.mask_plan(FRAMES)
        return loss_fn(whole, batch, plan, KEY, jnp.int32(OBJECTS))[0]

    both = functools.partial(jax.value_and_grad(loss), learnt)
    if shared := how.get("shared_by"):
        mesh = sharding.make_mesh(1, 1, shared.size, jax.devices()[: shared.size])
        alone = both

        def summed(batch):
            return jax.lax.psum(alone(batch), sharding.AXES)

        on_devices = jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(sharding.shares(),),
            out_specs=PartitionSpec(),
            check_vma=False,
        )

        def both(batch):
            return on_devices(sharding.pad_objects(batch, mesh))

    return jax.device_get(jax.jit(both)(batch))


@pytest.fixture(scope="module")
def whole(model, params, batch):
    return value_and_grad(model, params, batch)


def far(one, other) -> float:
    """The largest distance of two gradients' leaves, of the leaf's norm."""
    norms = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), one[1], other[1])
    return max(jax.tree.leaves(norms))


def test_segments_have_the_gradient_of_the_whole(model, params, batch, whole):
    parts = value_and_grad(model, params, batch, segment=2)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    assert far(parts, whole) < CLOSE


def test_a_truncated_gradient_ends_where_a_segment_does(model, params, batch, whole):
    cut = value_and_grad(model, params, batch, segment=2, truncate=True)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)
    assert far(cut, whole) > 100 * CLOSE


def test_devices_that_share_a_video_find_its_loss_and_gradient(model, params, batch, whole):
    shared = value_and_grad(model, params, batch, shared_by=Shared("model", 2))
    np.testing.assert_allclose(shared[0], whole[0], rtol=1e-5)
    assert far(shared, whole) < CLOSE
