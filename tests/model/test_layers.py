"""Layers against plain formulas or XLA's own slower forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax.model import hiera, layers, position
from sam2_jax.model.attention import attention

CLOSE = 1e-5  # float32 sums of a few hundred products


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def same_with_gradients(ours, plain, *args):
    """Two functions agree, and so do their gradients for random cotangents."""
    expected, pull = jax.vjp(plain, *args)
    got, pull_ours = jax.vjp(ours, *args)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    out = normal(9, *expected.shape)
    for a, b in zip(pull_ours(out), pull(out), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_depthwise_on_cpu_is_the_convolution():
    x, kernel = normal(0, 2, 9, 6, 5), normal(1, 7, 7, 1, 5)

    plain = partial(layers.xla_conv, stride=1, pad=3, groups=5)
    same_with_gradients(layers.depthwise_conv, plain, x, kernel)


@pytest.mark.parametrize("size, stride, pad", [(7, 4, 3), (3, 2, 1), (2, 2, 0), (4, 4, 0)])
def test_strided_conv_is_the_convolution(size, stride, pad):
    x, kernel = normal(0, 2, 24, 16, 3), normal(1, size, size, 3, 5)

    ours = partial(layers.strided_conv, stride=stride, pad=pad)
    plain = partial(layers.xla_conv, stride=stride, pad=pad)
    same_with_gradients(ours, plain, x, kernel)


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-4, 4, 101)
    np.testing.assert_allclose(layers.gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    assert np.abs(layers.gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 1e-4


@pytest.mark.parametrize("size", [4, 7])
def test_windows_go_apart_and_back_together(size):
    x = normal(0, 2, 8, 11, 3)
    windows = hiera.to_windows(x, size)
    assert windows.shape[1:3] == (size, size)
    np.testing.assert_array_equal(hiera.from_windows(windows, 8, 11), x)
    np.testing.assert_array_equal(windows[0], np.asarray(x)[0, :size, :size])


def test_key_mask_leaves_keys_out_exactly():
    q, k, v = normal(0, 2, 5, 2, 4), normal(1, 2, 6, 2, 4), normal(2, 2, 6, 2, 3)
    mask = jnp.array([[True, True, False, True, False, False]])
    masked, _ = attention(q, k, v, mask)
    kept = np.array([0, 1, 3])
    np.testing.assert_allclose(masked, attention(q, k[:, kept], v[:, kept])[0], atol=1e-6)


def test_dropout_sums_let_the_values_be_projected_afterwards():
    q, k, v = normal(0, 1, 4, 1, 8), normal(1, 1, 6, 1, 8), normal(2, 1, 6, 1, 3)
    w, b = normal(3, 3, 7), normal(4, 7)
    key = jax.random.key(5)
    early, _ = attention(q, k, v @ w + b, dropout_rate=0.5, dropout_key=key)
    late, sums = attention(q, k, v, dropout_rate=0.5, dropout_key=key)
    assert sums is not None and np.abs(sums - 1).max() > 0.1
    np.testing.assert_allclose(late @ w + sums * b, early, atol=CLOSE)


def test_bicubic_repeats_the_border_and_sums_to_one():
    matrix = position.bicubic_matrix(32, 7)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    np.testing.assert_allclose(position.bicubic_matrix(7, 7), np.eye(7), atol=1e-6)
    # Keys' kernel with a = -0.75 half way between two samples
    np.testing.assert_allclose(
        position.bicubic_matrix(8, 4)[3, :4],
        [-0.10546875, 0.87890625, 0.26171875, -0.03515625],
        atol=1e-6,
    )


def test_rotation_keeps_lengths_and_depends_on_relative_place():
    side, channels = 4, 8
    table = position.rotary_table(side, channels)
    q = jnp.broadcast_to(normal(0, channels), (side * side, channels))
    k = jnp.broadcast_to(normal(1, channels), (side * side, channels))
    q, k = position.rotate(q, table), position.rotate(k, table)
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), jnp.linalg.norm(q[0]), rtol=1e-5)
    scores = np.asarray(q @ k.T).reshape(side, side, side, side)  # y x y' x'
    np.testing.assert_allclose(scores[0, 0, 1, 2], scores[2, 1, 3, 3], rtol=1e-4)
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3


def test_max_pooling_takes_the_first_of_equals_as_torch_does():
    """Value and gradient, of ties and of what is no number; an odd last row is dropped."""
    x = np.zeros((1, 5, 6, 1), np.float32)
    x[0, :, :, 0] = [
        [1, 1, 0, 0, -2, -1],
        [0, 1, 0, 0, -1, -3],
        [2, 3, np.nan, 1, 0, 1],
        [3, 3, 1, 1, np.nan, 5],
        [9, 9, 9, 9, 9, 9],
    ]
    out, pull = jax.vjp(hiera.max_pool2, jnp.asarray(x))
    np.testing.assert_array_equal(out[0, :, :, 0], [[1, 0, -1], [3, np.nan, np.nan]])
    (grad,) = pull(jnp.arange(1.0, 7.0).reshape(1, 2, 3, 1))
    expected = np.zeros((5, 6))
    for row, column, value in [(0, 0, 1), (0, 2, 2), (0, 5, 3), (2, 1, 4), (2, 2, 5), (3, 4, 6)]:
        expected[row, column] = value
    np.testing.assert_array_equal(grad[0, :, :, 0], expected)
