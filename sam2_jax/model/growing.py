"""Attention to as many memories as there are: a loop over blocks of them, whose end is not static.

One program serves every number of memories, and none is computed for memories that do not exist.
Keys are made of the memories inside the loop, block by block, so that nothing of the size of all
keys, or of all weights, is ever held. The forward pass rescales what it has summed so far whenever
a larger logit appears; the backward pass makes the weights again (FlashAttention, arXiv
2205.14135). Every query has one head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from sam2_jax.model.blockwise import gain, gradients, logits_of, mean_gradient, multiply
from sam2_jax.model.draws import Draw, kept
from sam2_jax.model.layers import product
from sam2_jax.model.position import rotate
from sam2_jax.types import Array


class Remembered(NamedTuple):
    """What is attended to, of n objects, and how keys are made of it."""

    memory: Float[Array, "n k t d"]  # t tokens of k frames
    temporal: Float[Array, "k d"]  # code of each frame's distance
    pointers: Float[Array, "n p d"]  # object pointers
    times: Float[Array, "p d"]  # their codes
    kernel: Float[Array, "d c"]  # of the projection to keys
    bias: Float[Array, " c"]


class Scope(NamedTuple):
    """Which of it exists, and where."""

    order: Int[Array, " k"]  # of the frames; the first `count` exist
    count: Int[Array, ""]
    pointer_mask: Bool[Array, " p"]  # pointers that exist
    position: Float[Array, "t d"]  # code of a token's place
    table: Float[Array, "t 2 f"]  # its rotary angles
    draw: Draw | None = None  # of dropout on weights: columns of all frames, then of pointers


def make_keys(
    of: Remembered, x: Float[Array, "n t d"], code: Float[Array, "t d"]
) -> Float[Array, "n t c"]:
    """Memories or pointers with their code, projected."""
    x = (x + code.astype(x.dtype)).astype(of.kernel.dtype)
    return product(x, of.kernel) + of.bias.astype(of.kernel.dtype)


def again(fn: Callable, *args: Any) -> Any:
    """What the forward pass had computed and did not keep. Who counts work may leave it out."""
    return fn(*args)


def attend(
    query: Float[Array, "n q c"], of: Remembered, scope: Scope, rate: float, block: int
) -> tuple[Float[Array, "n q d"], Float[Array, "n q"]]:
    """softmax(query keys^T / sqrt(c)) memories, and the sums of the weights that dropout keeps.

    `query` has its rotary code. At most `block` tokens of a frame are attended to at a time; memory
    is that of so many columns of the weights. `scope.draw` drops weights at `rate`.
    """
    tokens = of.memory.shape[2]
    size = next(n for n in range(min(block, tokens), 0, -1) if tokens % n == 0)
    out, sums = _attend(rate, size, query[:, None], of, scope)
    return out[:, 0], sums[:, 0].astype(out.dtype)


def _output(rate, size, query, of, scope):
    return _forward(rate, size, query, of, scope)[0]


def _forward(rate, size, query, of, scope):
    def add(state, keys, values, mask, keep):
        top, total, out, sums = state
        logits = logits_of(query, keys[:, None], mask)
        new = jnp.maximum(top, logits.max(-1))
        weights, fade = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
        total = total * fade + weights.sum(-1)
        if keep is not None:
            weights = jnp.where(keep, weights, 0.0)
            sums = sums * fade + weights.sum(-1)
        more = multiply("nhqk,nkd->nhqd", weights.astype(values.dtype), values)
        return new, total, out * fade[..., None] + more, sums

    def turn(i, state):
        block = _block(of.memory, scope, i, size)
        keys = rotate(make_keys(of, block.memory, block.code(of)), block.table)
        return add(state, keys, block.memory, None, _kept(scope, rate, block.start, size))

    zeros = jnp.zeros(query.shape[:3], jnp.float32)
    out = jnp.zeros((*query.shape[:3], of.memory.shape[-1]), jnp.float32)
    state = jnp.full_like(zeros, jnp.finfo(jnp.float32).min), zeros, out, zeros
    pointers = of.pointers.shape[1]
    keep = _kept(scope, rate, _tokens(of), pointers)
    mask = scope.pointer_mask[None]
    state = add(state, make_keys(of, of.pointers, of.times), of.pointers, mask, keep)
    top, total, out, sums = _loop(of, scope, size, turn, state)
    scale = 1.0 / total
    if scope.draw is not None:
        scale = scale * gain(rate)
    sums = sums * scale if scope.draw is not None else jnp.ones_like(sums)
    out = (out * scale[..., None]).astype(of.memory.dtype)
    return (out, sums), (query, of, scope, out, sums, top + jnp.log(total))


def _backward(rate, size, saved, cotangents):
    query, of, scope, out, sums, log_total = saved
    g_out, g_sums = cotangents
    mean = mean_gradient(g_out, out, g_sums, None if scope.draw is None else sums)

    def back(keys, values, mask, keep):
        logits = again(logits_of, query, keys[:, None], mask)
        weights = jnp.exp(logits - log_total[..., None])
        found = gradients(
            weights, keep, gain(rate), query, keys[:, None], values[:, None], g_out, g_sums, mean
        )
        g_query, *rest = found
        return g_query, *(x[:, 0] for x in rest)

    def turn(i, state):
        g_query, g_memory, g_temporal, g_kernel, g_bias = state
        block = _block(of.memory, scope, i, size)

        code = block.code(of)
        keys = again(rotate, again(make_keys, of, block.memory, code), block.table)
        keep = _kept(scope, rate, block.start, size)
        more, g_keys, g_values = back(keys, block.memory, None, keep)
        turned_back = rotate(g_keys.astype(keys.dtype), block.table * jnp.array([[1.0], [-1.0]]))
        g_block, g_code, more_kernel, more_bias = _through_keys(of, block.memory, code, turned_back)
        g_block = (g_block + g_values)[:, None].astype(g_memory.dtype)
        at = (0, block.slot, block.place, 0)
        return (
            g_query + more,
            jax.lax.dynamic_update_slice(g_memory, g_block, at),
            g_temporal.at[block.slot].add(g_code.sum(0)),
            g_kernel + more_kernel,
            g_bias + more_bias,
        )

    pointers = of.pointers.shape[1]

    keys = again(make_keys, of, of.pointers, of.times)
    keep = _kept(scope, rate, _tokens(of), pointers)
    g_query, g_keys, g_values = back(keys, of.pointers, scope.pointer_mask[None], keep)
    g_pointers, g_times, g_kernel, g_bias = _through_keys(
        of, of.pointers, of.times, g_keys.astype(keys.dtype)
    )
    sums_so_far = (
        g_query,
        jnp.zeros_like(of.memory),
        jnp.zeros_like(of.temporal),
        g_kernel,
        g_bias,
    )
    g_query, g_memory, g_temporal, g_kernel, g_bias = _loop(of, scope, size, turn, sums_so_far)
    g_of = Remembered(
        g_memory,
        g_temporal,
        (g_pointers + g_values).astype(of.pointers.dtype),
        g_times.astype(of.times.dtype),
        g_kernel.astype(of.kernel.dtype),
        g_bias.astype(of.bias.dtype),
    )
    return g_query.astype(query.dtype), g_of, None


_attend = jax.custom_vjp(_output, nondiff_argnums=(0, 1))
_attend.defvjp(_forward, _backward)


def _through_keys(of: Remembered, x: Array, code: Array, g_keys: Array) -> tuple[Array, ...]:
    """Gradients of `make_keys`: of x, of its code, and of kernel and bias, which in float32."""
    x = (x + code.astype(x.dtype)).astype(of.kernel.dtype)
    rows, g = x.reshape(-1, x.shape[-1]), g_keys.reshape(-1, g_keys.shape[-1])
    g_x = product(g_keys, of.kernel.T)
    g_kernel = multiply("rd,rc->dc", rows, g)
    return g_x, g_x.sum(0), g_kernel, g.sum(0, dtype=jnp.float32)


class _Block(NamedTuple):
    """Some tokens of a frame."""

    memory: Array
    slot: Array
    place: Array  # of the first of them in the frame
    start: Array  # of the first of them among all columns
    position: Array
    table: Array

    def code(self, of: Remembered) -> Array:
        return self.position + of.temporal[self.slot]


def _block(memory: Array, scope: Scope, i: Any, size: int) -> _Block:
    tokens = memory.shape[2]
    parts = tokens // size
    slot, place = scope.order[i // parts], i % parts * size
    frame = jax.lax.dynamic_index_in_dim(memory, slot, 1, keepdims=False)
    return _Block(
        jax.lax.dynamic_slice_in_dim(frame, place, size, 1),
        slot,
        place,
        slot * tokens + place,
        jax.lax.dynamic_slice_in_dim(jnp.asarray(scope.position), place, size),
        jax.lax.dynamic_slice_in_dim(jnp.asarray(scope.table), place, size),
    )


def _tokens(of: Remembered) -> int:
    return of.memory.shape[1] * of.memory.shape[2]


def _kept(scope: Scope, rate: float, start: Any, size: int) -> Array | None:
    if scope.draw is None:
        return None
    columns = jax.lax.dynamic_slice_in_dim(scope.draw.columns, start, size, 2)
    return kept(Draw(scope.draw.rows, columns), rate)


def _loop(of: Remembered, scope: Scope, size: int, turn: Any, state: Any) -> Any:
    parts = of.memory.shape[2] // size
    most = of.memory.shape[1] * parts
    turns = scope.count * parts

    def more(carry):
        # The second is always so; it tells whoever reads the program how many there can be
        return (carry[0] < turns) & (carry[0] < most)

    start = jnp.zeros((), jnp.int32), state
    return jax.lax.while_loop(more, lambda c: (c[0] + 1, turn(*c)), start)[1]
