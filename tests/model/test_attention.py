"""Every implementation of attention is the same function, dropout's draw and gradients included."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sam2_jax import work
from sam2_jax.model import draws
from sam2_jax.model.attention import attention, plain
from sam2_jax.model.blockwise import blockwise
from sam2_jax.model.kernels import LARGE, Kernel

# Of the largest element: rounding of sums of a hundred terms; bfloat16 has eight bits
CLOSE = {"float32": 2e-6, "bfloat16": 1.5e-2}
SIDE = math.isqrt(LARGE - 1) + 1  # so many queries and keys are a large attention
BLOCKS = 4, 8  # of queries and keys, so that most sizes here do not divide


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def inputs(n, q, k, heads, d, dv, dtype="float32"):
    """(query, key, value)"""
    return (
        normal(0, n, q, heads, d, dtype=dtype),
        normal(1, n, k, heads, d, dtype=dtype),
        normal(2, n, k, heads, dv, dtype=dtype),
    )


def same(got, expected, close):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=close * max(scale, 1e-3)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 13, 29, 2, 16, 4), (1, 8, 16, 1, 8, 8)])
def test_blockwise_is_the_formula(shape, masked, rate, dtype):
    n, q, k, heads, _, dv = shape
    args = inputs(*shape, dtype=dtype)
    mask = (jnp.arange(k) % 3 != 1)[None] if masked else None
    draw = draws.make_draw(jax.random.key(7), n, heads, q, k) if rate else None

    def formula(query, key, value):
        out, sums = plain(query, key, value, mask, rate, draw)
        return out, jnp.ones((n, q, heads, 1), dtype) if sums is None else sums

    def blocks(query, key, value):
        return blockwise(query, key, value, mask, rate, draw, BLOCKS)

    expected, pull = jax.vjp(formula, *args)
    got, pull_blocks = jax.vjp(blocks, *args)
    cotangents = normal(8, n, q, heads, dv, dtype=dtype), normal(9, n, q, heads, 1, dtype=dtype)
    gradients = zip(pull_blocks(cotangents), pull(cotangents), strict=True)
    for a, b in (*zip(got, expected, strict=True), *gradients):
        assert a.dtype == b.dtype == dtype
        same(a, b, CLOSE[dtype])


def test_one_key_gets_all_the_weight():
    q, k, v = inputs(1, 5, 1, 1, 8, 8)
    out, sums = blockwise(q, k, v, None, 0.0, None, BLOCKS)
    np.testing.assert_allclose(out, jnp.broadcast_to(v, out.shape), rtol=1e-6)
    np.testing.assert_array_equal(sums, 1)


def test_far_away_logits_do_not_overflow():
    q, k, v = inputs(1, 5, 9, 1, 8, 8)
    grad = jax.grad(lambda q: blockwise(q, -1e3 * k, v, None, 0.0, None, BLOCKS)[0].sum())
    assert np.isfinite(grad(1e2 * q)).all()
    assert np.isfinite(blockwise(1e2 * q, 1e3 * k, v, None, 0.0, None, BLOCKS)[0]).all()


def test_gradients_of_a_draw_are_those_of_finite_differences():
    args = inputs(1, 5, 11, 1, 4, 3)
    draw = draws.make_draw(jax.random.key(3), 1, 1, 5, 11)

    def drop(query, key, value):
        return blockwise(query, key, value, None, 0.4, draw, BLOCKS)

    check_grads(drop, args, 1, ["rev"], eps=1e-2)


def test_dropout_leaves_the_expectation_alone():
    args = inputs(1, 3, 20, 1, 4, 3)

    def once(key):
        draw = draws.make_draw(key, 1, 1, 3, 20)
        return jnp.concatenate(blockwise(*args, None, 0.25, draw, BLOCKS), -1)

    many = np.asarray(jax.vmap(once)(jax.random.split(jax.random.key(0), 4000)))
    expected = jnp.concatenate(blockwise(*args, None, 0.0, None, BLOCKS), -1)
    error = many.std(0) / np.sqrt(len(many))
    assert error.min() > 0
    np.testing.assert_array_less(np.abs(many.mean(0) - expected), 5 * error)


def test_no_implementation_but_the_formula_holds_all_weights():
    shape = 1, 512, 2048, 1, 32, 16
    weights = 4 * 512 * 2048
    draw = draws.make_draw(jax.random.key(0), 1, 1, 512, 2048)

    def temporaries(fn):
        def loss(q, k, v):
            return fn(q, k, v, None, 0.1, draw)[0].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs(*shape)).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(plain) > 2 * weights
    assert temporaries(blockwise) < weights


def test_work_is_two_products_forward_and_five_backward():
    n, q, k, heads, d, dv = 2, 128, 256, 2, 16, 4
    args = inputs(n, q, k, heads, d, dv)
    product = 2 * n * heads * q * k
    forward = product * (d + dv)
    backward = product * (3 * d + 2 * dv)  # of these, d makes the logits again

    def loss(query, key, value):
        return (blockwise(query, key, value)[0] ** 2).sum()

    assert work.count(loss, *args).total == forward
    grad = jax.grad(loss, (0, 1, 2))
    assert work.count(grad, *args).total == forward + backward


def test_a_key_makes_the_same_draw_in_every_implementation():
    args = inputs(1, SIDE, SIDE, 1, 4, 3)

    def drop(name, seed):
        return attention(*args, None, 0.5, jax.random.key(seed), Kernel(name))

    outs = {name: drop(name, 1) for name in ("xla", "blockwise", "auto")}
    for out, sums in outs.values():
        same(out, outs["xla"][0], 1e-5)
        same(sums, outs["xla"][1], 1e-5)
    np.testing.assert_array_equal(outs["auto"][0], outs["blockwise"][0])
    assert np.abs(drop("blockwise", 2)[0] - outs["xla"][0]).max() > 0.01


def test_sums_come_only_with_dropout():
    args = inputs(1, SIDE, SIDE, 1, 4, 3)
    assert attention(*args, kernel=Kernel("blockwise"))[1] is None
    assert attention(*args, None, 0.0, jax.random.key(0), Kernel("blockwise"))[1] is None
    assert attention(*args, None, 0.1, None, Kernel("blockwise"))[1] is None
