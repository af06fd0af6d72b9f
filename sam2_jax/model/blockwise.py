"""Attention that never holds all of its weights, with dropout on them.

The forward pass goes over blocks of queries, each of which sees all keys at once; what it leaves
are the output and, per query, the logarithm of the sum that the softmax divides by. From these the
backward pass (FlashAttention, arXiv 2205.14135, appendix B) makes the weights again, block by block
of keys, so that the gradients of keys and values are written once and only that of the queries,
fewer by far in attention to a memory, is added up. Two products forward; four and one made again
backward. Dropout is drawn again from the same numbers.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from sam2_jax.model.draws import Draw, kept, probability
from sam2_jax.types import Array

# Queries of a step of the forward pass, keys of a step of the backward pass: on a CPU as many as
# its caches hold; where a step is a launch of kernels, more.
CPU_BLOCKS = 128, 128
BLOCKS = 256, 512


def blockwise(
    query: Float[Array, "n q heads d"],
    key: Float[Array, "n k heads d"],
    value: Float[Array, "n k heads dv"],
    key_mask: Bool[Array, "#n k"] | None = None,
    dropout_rate: float = 0.0,
    draw: Draw | None = None,
    blocks: tuple[int, int] = CPU_BLOCKS,
) -> tuple[Float[Array, "n q heads dv"], Float[Array, "n q heads 1"]]:
    """As `attention`, and the sums of the weights always (1 without a `draw`).

    Temporary memory is that of `blocks[0]` rows, or `blocks[1]` columns, of the weights.
    """
    heads_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
    blocks = min(blocks[0], query.shape[1]), min(blocks[1], key.shape[1])
    out, sums = _blockwise(dropout_rate, blocks, *heads_first, key_mask, draw)
    return out.transpose(0, 2, 1, 3), sums.transpose(0, 2, 1)[..., None].astype(value.dtype)


def _output(rate, blocks, query, key, value, mask, draw):
    return _forward(rate, blocks, query, key, value, mask, draw)[0]


def _forward(rate, blocks, query, key, value, mask, draw):
    """((output, sums of the kept weights), what the backward pass needs)."""
    size, queries = blocks[0], query.shape[2]

    def rows(_, block):
        q, numbers = block
        logits = logits_of(q, key, mask)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1)
        scale, sums = 1.0 / total, jnp.ones_like(total)
        if draw is not None:
            weights = jnp.where(kept(Draw(numbers, draw.columns), rate), weights, 0.0)
            scale = scale * gain(rate)
            sums = weights.sum(-1) * scale
        out = multiply("nhqk,nhkd->nhqd", weights.astype(value.dtype), value) * scale[..., None]
        return None, (out.astype(value.dtype), sums, top[..., 0] + jnp.log(total))

    numbers = None if draw is None else _cut(draw.rows, size)
    _, (out, sums, log_total) = jax.lax.scan(rows, None, (_cut(query, size), numbers))
    out, sums, log_total = (_join(x, queries) for x in (out, sums, log_total))
    return (out, sums), (query, key, value, mask, draw, out, sums, log_total)


def _backward(rate, blocks, saved, cotangents):
    query, key, value, mask, draw, out, sums, log_total = saved
    g_out, g_sums = cotangents
    size, keys = blocks[1], key.shape[2]
    mean = mean_gradient(g_out, out, g_sums, None if draw is None else sums)
    if mask is None and keys % size:
        mask = jnp.ones((1, keys), bool)

    def columns(g_query, block):
        k, v, m, numbers = block
        weights = jnp.exp(logits_of(query, k, m) - log_total[..., None])
        keep = None if draw is None else kept(Draw(draw.rows, numbers), rate)
        more, g_key, g_value = gradients(
            weights, keep, gain(rate), query, k, v, g_out, g_sums, mean
        )
        g_query = g_query + more
        return g_query, (g_key.astype(key.dtype), g_value.astype(value.dtype))

    numbers = None if draw is None else _cut(draw.columns, size)
    masks = None if mask is None else _cut(mask[:, None], size)[:, :, 0]
    by_keys = (_cut(key, size), _cut(value, size), masks, numbers)
    start = jnp.zeros(query.shape, jnp.float32)
    g_query, (g_key, g_value) = jax.lax.scan(columns, start, by_keys)
    return g_query.astype(query.dtype), _join(g_key, keys), _join(g_value, keys), None, None


_blockwise = jax.custom_vjp(_output, nondiff_argnums=(0, 1))
_blockwise.defvjp(_forward, _backward)


def mean_gradient(
    g_out: Float[Array, "n h q dv"],
    out: Float[Array, "n h q dv"],
    g_sums: Float[Array, "n h q"],
    sums: Float[Array, "n h q"] | None,
) -> Float[Array, "n h q"]:
    """The sum over all keys of a query's weights times their gradients; `sums`: under dropout."""
    mean = (g_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    return mean if sums is None else mean + g_sums * sums


def gradients(
    weights: Float[Array, "n h q k"],
    keep: Bool[Array, "n h q k"] | None,
    scale: float,
    query: Float[Array, "n h q d"],
    key: Float[Array, "n h k d"],
    value: Float[Array, "n h k dv"],
    g_out: Float[Array, "n h q dv"],
    g_sums: Float[Array, "n h q"],
    mean: Float[Array, "n h q"],
) -> tuple[Float[Array, "n h q d"], Float[Array, "n h k d"], Float[Array, "n h k dv"]]:
    """Gradients of queries, keys and values, in float32, from a block of keys.

    `weights` are those of the softmax, of which dropout keeps some, times `scale`; `g_out` and
    `g_sums` are the gradients of the output and of the sums of the kept ones. With D the kept and
    scaled weights and g their gradient, that of a logit is D g minus its weight times the sum of
    D g over all keys, which is `mean`.
    """
    g = multiply("nhqd,nhkd->nhqk", g_out, value)
    dropped = weights
    if keep is not None:
        g = g + g_sums[..., None]
        dropped = jnp.where(keep, weights * scale, 0.0)
    g_value = multiply("nhqk,nhqd->nhkd", dropped.astype(value.dtype), g_out)
    g_logits = dropped * g - weights * mean[..., None]
    g_logits = (g_logits / math.sqrt(query.shape[-1])).astype(query.dtype)
    g_key = multiply("nhqk,nhqd->nhkd", g_logits, query)
    return multiply("nhqk,nhkd->nhqd", g_logits, key), g_key, g_value


def logits_of(
    query: Float[Array, "n h q d"], key: Float[Array, "n h k d"], mask: Bool[Array, "#n k"] | None
) -> Float[Array, "n h q k"]:
    """query key^T / sqrt(d) in float32; -inf where the mask says no."""
    logits = multiply("nhqd,nhkd->nhqk", query, key) / math.sqrt(query.shape[-1])
    return logits if mask is None else jnp.where(mask[:, None, None, :], logits, -jnp.inf)


def multiply(formula: str, a: Array, b: Array) -> jax.Array:
    """einsum of two arrays, summed and returned in float32."""
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def gain(rate: float) -> float:
    """What the kept weights are multiplied with, so that their expectation stays."""
    return 1.0 / probability(rate) if probability(rate) else 0.0


def _cut(x, size):
    """Axis 2 in blocks, which come first; the last is filled up with zeros."""
    x = jnp.pad(x, [(0, -x.shape[2] % size if axis == 2 else 0) for axis in range(x.ndim)])
    x = x.reshape(*x.shape[:2], -1, size, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)


def _join(x, length):
    """Undoes `_cut`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]
