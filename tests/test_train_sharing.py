"""The train step on devices that share videos: three objects on two of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sam2_jax import sharding, train
from sam2_jax.types import Array, Batch
from tests.test_train import BATCH, PIXELS, RELATIVE, init_params, make_optimizer, sample_plan

OBJECTS = 3
# Videos with all objects, with few, and with none
VALID = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], bool)


def loss_of_own_objects(params, batch, plan, key, objects) -> tuple[Array, train.Metrics]:
    """A sum over the objects that a device is given, each compared with what its mask says."""
    pixels = jnp.asarray(batch.images, jnp.float32).mean((1, 4)).reshape(len(batch.images), -1)
    hidden = jnp.tanh(pixels / 255 @ params["image_encoder"]["kernel"])
    truth = jnp.asarray(batch.masks, jnp.float32).mean((1, 3, 4))
    out = (hidden @ params["memory_attention"]["kernel"]).sum(-1)[:, None] * (1 + truth)
    loss = (batch.valid * (out - truth) ** 2).sum() / objects
    return loss, {"loss_mask": loss / 2}


def step_on(data: int, fsdp: int, model: int):
    """(optimizer state, metrics) after a step on a mesh."""
    mesh = sharding.make_mesh(data, fsdp, model, jax.devices()[: data * fsdp * model])
    optimizer = make_optimizer()
    params = init_params(jax.random.key(0))
    step = train.make_train_step(
        optimizer, loss_fn=loss_of_own_objects, sample_plan=sample_plan, mesh=mesh
    )
    rng = np.random.default_rng(0)
    batch = Batch(
        rng.integers(0, 255, (BATCH, 2, PIXELS, PIXELS, 3)).astype(np.uint8),
        rng.random((BATCH, 2, OBJECTS, PIXELS, PIXELS)) < np.array([[[0.2]], [[0.5]], [[0.8]]]),
        VALID,
    )
    begin = functools.partial(train.init_state, optimizer=optimizer)
    shapes = jax.eval_shape(begin, params)
    state = jax.jit(begin, out_shardings=train.state_shardings(shapes, mesh))(params)
    state, metrics = train.jit_step(step, shapes, mesh)(
        state, sharding.put_batch(batch, mesh), jax.random.key(1)
    )
    # Moments, not parameters: Adam divides rounding by rounding where a gradient is near 0
    return jax.device_get((state.opt_state, metrics))


def test_devices_that_share_videos_take_the_step_of_one():
    alone = step_on(1, 1, 1)
    assert alone[1]["loss"] > 0
    for axes in ((1, 1, 2), (1, 2, 2)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=RELATIVE, atol=1e-7),
            alone,
            step_on(*axes),
        )
