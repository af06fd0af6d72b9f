"""With train.precision=float32 whatever is traced multiplies in float32 on every accelerator."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.lax import Precision

from configs import smoke
from sam2_jax import compiled, eval_loss, recipe, validation
from sam2_jax import config as config_lib
from sam2_jax.model.layers import Conv
from sam2_jax.predict import video
from tests.test_evaluate import Squares
from tests.test_train import ALONE, example, setup

SIDE = 32
FULL, DEFAULT = (Precision.HIGHEST, Precision.HIGHEST), None


def precisions(jaxpr: Any) -> Iterator[Any]:
    """Of every product and convolution, in whatever is called."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.params["precision"]
        for x in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(x):
                yield from precisions(x.jaxpr if isinstance(x, core.ClosedJaxpr) else x)


def is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def small_config(precision):
    c = smoke.get_config()
    c.model.resolution = SIDE
    c.data.update(num_frames=2, max_objects=1, batch_size=1)
    c.prompts.prob_points = 0.0
    c.eval.loss_clips = 1
    c.train.update(precision=precision, remat="none")
    return config_lib.finish(c)


@pytest.fixture(scope="module")
def parts():
    return compiled.make_parts(small_config("float32"), jax.devices()[:1])


def test_the_step(parts):
    config = small_config("float32")
    step = recipe.make_config_step(config, parts.model, parts.optimizer, parts.mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.make_jaxpr(step)(parts.state, compiled.batch_shapes(config, 1), key)
    found = list(precisions(traced.jaxpr))
    assert len(found) > 100 and set(found) == {FULL}


@pytest.mark.parametrize(("precision", "expected"), [("float32", FULL), ("bfloat16", DEFAULT)])
def test_any_step(precision, expected):
    state, step, _ = setup(ALONE, precision)
    traced = jax.make_jaxpr(step)(state, example(0), jax.random.key(0))
    assert set(precisions(traced.jaxpr)) == {expected}


@pytest.mark.parametrize(("precision", "expected"), [("float32", FULL), ("bfloat16", DEFAULT)])
def test_evaluations(parts, monkeypatch, precision, expected):
    config = small_config(precision)
    seen = []

    def stand_in(*_, **__):
        seen.extend(precisions(jax.make_jaxpr(jnp.matmul)(np.eye(2), np.eye(2)).jaxpr))
        raise InterruptedError

    monkeypatch.setattr(eval_loss.track, "track", stand_in)
    monkeypatch.setattr(video, "encode_frames", stand_in)
    sets = [validation.EvalSet("", Squares())]
    loss_of = eval_loss.make_eval_loss(config, parts.model, sets, parts.mesh)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), parts.state.params)
    with pytest.raises(InterruptedError):
        loss_of(params, 0)
    assert seen == [expected]
    with pytest.raises(InterruptedError):
        validation.validate(config, parts.model, sets, "", params, 0)
    assert len(seen) > 1 and set(seen) == {expected}


def test_composed_convolutions():
    """Their kernel is small, and what it is rounded to is computed with for every pixel."""
    first, second = Conv(8), Conv(2)
    kernels = [jnp.ones((1, 1, *sizes), "bfloat16") for sizes in ((4, 8), (8, 2))]
    own = [{"params": {"kernel": k, "bias": jnp.ones(k.shape[-1])}} for k in kernels]

    def after(x):
        return second.bind(own[1]).after(first.bind(own[0]), x)

    found = list(precisions(jax.make_jaxpr(after)(np.ones((1, 2, 2, 4), np.float32)).jaxpr))
    assert found == [FULL, FULL, DEFAULT]
