"""The norm and its gradients against automatic differentiation, and what it keeps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax.model import norms

SHAPE = (3, 5, 6, 16)


@pytest.fixture
def given():
    """Input far from zero, as residual streams are, scale, bias, and what multiplies the output."""
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(2))
    scale, bias = rng.normal(size=(2, SHAPE[-1])).astype(np.float32)
    return 3 + 2 * x, scale, bias, weights


def plain(x, scale, bias, epsilon):
    norm = nn.LayerNorm(epsilon, use_fast_variance=False)
    return jnp.asarray(norm.apply({"params": {"scale": scale, "bias": bias}}, x))


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_output_and_gradients(given, epsilon):
    *args, weights = given

    def of(norm):
        value = jax.value_and_grad(lambda *a: (norm(*a, epsilon) * weights).sum(), (0, 1, 2))
        return value(*args)

    (value, grads), (known, exact) = of(norms.normalise), of(plain)
    np.testing.assert_allclose(value, known, rtol=1e-5)
    for grad, truth in zip(grads, exact, strict=True):
        np.testing.assert_allclose(grad, truth, atol=2e-6 * np.abs(truth).max())


def test_modules_are_that_norm(given):
    x, scale, bias, _ = given
    for module, name, epsilon in (
        (norms.LayerNorm(1e-3), "scale", 1e-3),
        (norms.LayerNorm2d(), "weight", norms.EPSILON_2D),
    ):
        out = jnp.asarray(module.apply({"params": {name: scale, "bias": bias}}, x))
        np.testing.assert_allclose(out, plain(x, scale, bias, epsilon), atol=1e-5)


def test_bfloat16_is_normalised_in_float32(given):
    x, scale, bias, weights = given
    low = jnp.asarray(x, jnp.bfloat16)
    out, pull = jax.vjp(lambda *a: jnp.asarray(norms.normalise(*a, 1e-6)), low, scale, bias)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, plain(low.astype(jnp.float32), scale, bias, 1e-6), atol=1e-5)
    assert [x.dtype for x in pull(weights)] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_it_keeps_one_array_of_the_inputs_size(given):
    *args, _ = given
    pull = jax.eval_shape(lambda *a: jax.vjp(lambda *b: norms.normalise(*b, 1e-6), *a)[1], *args)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)].count(SHAPE) == 1
