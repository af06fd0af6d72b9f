"""Attention to a memory that grows, against attention to all keys with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax.model import growing
from sam2_jax.model.attention import plain
from sam2_jax.model.draws import make_draw
from sam2_jax.model.kernels import Kernel
from sam2_jax.model.memory_attention import Memories, MemoryAttention
from sam2_jax.model.position import rotary_table, rotate


def make_memories(count, order, mask):
    """Of two objects: three frames of 16 tokens and as many pointers of two tokens each."""
    keys = jax.random.split(jax.random.key(0), 4)
    frames = jax.random.normal(keys[0], (2, 3, 16, 4))
    temporal = jax.random.normal(keys[1], (3, 4))
    pointers = jax.random.normal(keys[2], (2, 6, 4))
    times = jax.random.normal(keys[3], (6, 4))
    count = jnp.int32(count)
    return Memories(frames, temporal, pointers, times, jnp.asarray(order), count, mask)


def plainly(of, scope, rate):
    """`growing.attend` from all keys and all weights."""
    (n, frames_there, t, _), exists = (
        of.memory.shape,
        jnp.isin(jnp.arange(3), scope.order[: scope.count]),
    )

    def attend(query, of):
        codes = scope.position + of.temporal[:, None]
        frames = [growing.make_keys(of, of.memory[:, i], codes[i]) for i in range(frames_there)]
        keys = [rotate(x, scope.table) for x in frames]
        keys = jnp.concatenate([*keys, growing.make_keys(of, of.pointers, of.times)], 1)
        values = jnp.concatenate([of.memory.reshape(n, frames_there * t, -1), of.pointers], 1)
        mask = jnp.concatenate([jnp.repeat(exists, t), scope.pointer_mask])[None]
        q, k, v = (x[:, :, None] for x in (query, keys, values))
        out, sums = plain(q, k, v, mask, rate, scope.draw)
        sums = jnp.ones(out.shape[:2]) if sums is None else sums[:, :, 0, 0]
        return out[:, :, 0], sums

    return attend


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("block", [5, 16])
def test_attention_to_a_growing_memory_is_that_to_what_exists(count, rate, block):
    """Outputs and gradients, for frames in any order and in blocks that divide them or not."""
    m = make_memories(count, [2, 0, 1], None)
    keys = jax.random.split(jax.random.key(1), 5)
    kernel, bias = jax.random.normal(keys[0], (4, 8)), jax.random.normal(keys[1], (8,))
    of = growing.Remembered(m.frames, m.temporal, m.pointers, m.times, kernel, bias)
    query = jax.random.normal(keys[2], (2, 16, 8))
    draw = make_draw(keys[3], 2, 1, 16, 3 * 16 + 6) if rate else None
    position, table = jax.random.normal(keys[4], (16, 4)), jnp.asarray(rotary_table(4, 8))
    exist = jnp.arange(6) < 2 * count
    scope = growing.Scope(m.order, m.count, exist, position, table, draw)

    def graded(attend):
        def weighted(query, of):
            out, sums = attend(query, of)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)) + jnp.sum(
                sums * jnp.sin(jnp.arange(sums.size)).reshape(sums.shape)
            )

        return jax.jit(lambda *x: (attend(*x), jax.grad(weighted, (0, 1))(*x)))(query, of)

    ours = graded(lambda query, of: growing.attend(query, of, scope, rate, block))
    for a, b in zip(*map(jax.tree.leaves, (ours, graded(plainly(of, scope, rate)))), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_memory_attention_is_the_same_with_a_fused_kernel(monkeypatch, count, masked):
    monkeypatch.setattr("sam2_jax.model.memory_attention.LARGE", 1)
    monkeypatch.setattr("sam2_jax.model.memory_attention.choose", lambda kernel, *_: kernel.name)
    monkeypatch.setattr("sam2_jax.model.attention.choose", lambda *_: "xla")
    mask = jnp.asarray([True, True, False, True, True, False]) if masked else None
    args = jnp.ones((1, 16, 8)), np.ones((16, 8), np.float32), make_memories(count, [1, 2, 0], mask)
    outs = []
    for name in ("xla", "cudnn"):
        module = MemoryAttention(8, 16, 2, 0.0, 0.0, Kernel(name))
        outs.append(module.init_with_output(jax.random.key(1), *args, True)[0])
    np.testing.assert_allclose(outs[0], outs[1], atol=5e-5)
    assert np.abs(outs[0][0] - outs[0][1]).max() > 0.01
