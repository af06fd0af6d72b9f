"""Fused kernels against the formula: the TPU's interpreted, cuDNN's as it is called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import sharding, work
from sam2_jax.model import fused
from sam2_jax.model.attention import plain

# Of the largest element: another order of float32 sums; bfloat16's eight bits, also of the queries
# that are scaled before the product
CLOSE = {"float32": 2e-6, "bfloat16": 2e-2}


def inputs(n, q, k, heads, d, dv, dtype="float32"):
    """(query, key, value)"""
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (n, q, heads, d)).astype(dtype),
        jax.random.normal(keys[1], (n, k, heads, d)).astype(dtype),
        jax.random.normal(keys[2], (n, k, heads, dv)).astype(dtype),
    )


def same_with_gradients(ours, args, mask):
    """`ours` is the formula, and so are its gradients for random cotangents."""
    expected, pull = jax.vjp(lambda *a: plain(a[0], a[1], a[2], mask, 0.0, None)[0], *args)
    got, pull_ours = jax.vjp(jax.jit(ours), *args)
    out = jax.random.normal(jax.random.key(9), expected.shape).astype(expected.dtype)
    close = CLOSE[expected.dtype.name]
    for a, b in ((got, expected), *zip(pull_ours(out), pull(out), strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=close * np.abs(b).max())


@pytest.mark.parametrize(
    "shape, masked, dtype",
    [
        ((2, 130, 150, 1, 32, 16), False, "float32"),  # neither fills up its blocks
        ((1, 128, 600, 2, 32, 32), True, "float32"),  # two blocks of keys
        ((1, 128, 150, 1, 64, 16), True, "bfloat16"),
    ],
)
def test_flash_is_the_formula(shape, masked, dtype):
    mask = (jnp.arange(shape[2]) % 3 != 1)[None] if masked else None
    flash = functools.partial(fused.flash, key_mask=mask, interpret=True)
    same_with_gradients(flash, inputs(*shape, dtype=dtype), mask)


def test_flash_on_several_devices_is_each_ones_own():
    mesh = sharding.make_mesh(2, 2, 1)
    args = inputs(4, 16, 16, 1, 8, 8)
    flash = functools.partial(fused.flash, key_mask=None, interpret=True)
    split = jax.shard_map(
        flash, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH, check_vma=False
    )
    out = jax.jit(split)(*args)
    np.testing.assert_allclose(out, plain(*args, None, 0.0, None)[0], atol=1e-5)


def test_work_of_flash_is_counted():
    n, q, k, heads, d, dv = 2, 512, 1536, 2, 16, 4
    product = 2 * n * heads * q * k

    def loss(query, key, value):
        return fused.flash(query, key, value, None).sum()

    args = inputs(n, q, k, heads, d, dv)
    assert work.count(loss, *args).total == product * (d + dv)
    # One kernel for queries and one for keys and values: each makes the weights again; and the
    # product of the output with its gradient
    backward = product * (4 * d + 3 * dv) + 2 * n * heads * q * dv
    grad = jax.grad(loss, (0, 1, 2))
    assert work.count(grad, *args) == (product * (d + dv) + backward, 0, 0)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_gets_values_as_wide_as_keys_and_the_mask(monkeypatch, masked):
    original = jax.nn.dot_product_attention

    def on_cpu(query, key, value, *, mask, implementation):
        assert implementation == "cudnn" and value.shape == key.shape
        assert mask is None or mask.shape[2:] == (query.shape[1], key.shape[1])
        return original(query, key, value, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    mask = (jnp.arange(11) % 3 != 1)[None] if masked else None
    cudnn = functools.partial(fused.cudnn, key_mask=mask)
    same_with_gradients(cudnn, inputs(2, 7, 11, 2, 16, 4), mask)
