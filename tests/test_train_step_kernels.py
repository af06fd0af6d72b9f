"""The train step of several devices with the kernel that a TPU would take: traced, not compiled."""

import jax

from configs import smoke
from sam2_jax import compiled, recipe, train
from sam2_jax import config as config_lib


def test_flash_in_the_step_of_several_devices(monkeypatch):
    monkeypatch.setattr("sam2_jax.model.attention.LARGE", 1)
    c = smoke.get_config()
    c.model.update(resolution=64, attention_dropout=0.0)
    c.data.update(num_frames=2, max_objects=1, batch_size=2)
    c.prompts.prob_points = 0.0
    c.train.remat = "none"
    parts = compiled.make_parts(config_lib.finish(c), jax.devices()[:2])
    tpu = parts.model.clone(kernel=parts.model.kernel._replace(platform="tpu"))
    step = train.jit_step(
        recipe.make_config_step(c, tpu, parts.optimizer, parts.mesh), parts.state, parts.mesh
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = step.trace(parts.state, compiled.batch_shapes(c, 2), key)
    # Of the trunk and of memory attention, forward and backward
    assert str(traced.jaxpr).count("pallas_call") > 6
