"""Scaled dot-product attention as one function, computed in one of several ways."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from sam2_jax.model.blockwise import BLOCKS, CPU_BLOCKS, blockwise
from sam2_jax.model.draws import Draw, dropped, make_draw
from sam2_jax.model.fused import cudnn, flash
from sam2_jax.model.kernels import LARGE, XLA, Kernel, choose
from sam2_jax.types import Array


def attention(
    query: Float[Array, "n q heads d"],
    key: Float[Array, "n k heads d"],
    value: Float[Array, "n k heads dv"],
    key_mask: Bool[Array, "#n k"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    kernel: Kernel = XLA,
) -> tuple[Float[Array, "n q heads dv"], Float[Array, "n q heads 1"] | None]:
    """softmax(query key^T / sqrt(d)) value, the softmax in float32.

    `key_mask` leaves keys out exactly (weight 0). With a `dropout_key` the weights are dropped
    as in torch's scaled_dot_product_attention, and their sums are returned beside the output,
    so that a caller who projects the values afterwards can scale the bias; without, None.
    A key makes the same draw in every implementation.

    `kernel` says how large attentions (`kernels.LARGE`) are computed:

    - xla: all weights are written to memory, and kept for the backward pass.
    - blockwise: a block of them at a time, made again in the backward pass.
    - cudnn, flash: one fused kernel, on NVIDIA GPUs and on TPUs; no dropout. On several devices
      inside `jax.shard_map` only: the compiler cannot split a kernel.

    Raises:
        UserError: the implementation that `kernel` names cannot compute this.
    """
    (n, queries, heads, d), keys = query.shape, key.shape[1]
    draw = None
    if dropout_key is not None and dropout_rate > 0.0:
        draw = make_draw(dropout_key, n, heads, queries, keys)
    name = "xla"
    if queries * keys >= LARGE:
        name = choose(kernel, d, query.dtype, draw is not None, key_mask is not None)
    if name == "blockwise":
        blocks = CPU_BLOCKS if kernel.platform == "cpu" else BLOCKS
        out, sums = blockwise(query, key, value, key_mask, dropout_rate, draw, blocks)
    elif name == "cudnn":
        out, sums = cudnn(query, key, value, key_mask), None
    elif name == "flash":
        out, sums = flash(query, key, value, key_mask), None
    else:
        out, sums = plain(query, key, value, key_mask, dropout_rate, draw)
    return out, None if draw is None else sums


def plain(
    query: Float[Array, "n q heads d"],
    key: Float[Array, "n k heads d"],
    value: Float[Array, "n k heads dv"],
    key_mask: Bool[Array, "#n k"] | None,
    dropout_rate: float,
    draw: Draw | None,
) -> tuple[Float[Array, "n q heads dv"], Float[Array, "n q heads 1"] | None]:
    """`attention` as XLA compiles it from the formula; the sums only with a `draw`."""
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * (1.0 / math.sqrt(query.shape[-1]))
    if key_mask is not None:
        logits = jnp.where(key_mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    sums = None
    if draw is not None:
        weights = dropped(weights, draw, dropout_rate)
        sums = weights.sum(-1).transpose(0, 2, 1)[..., None].astype(value.dtype)
    out = jnp.einsum("nhqk,nkhd->nqhd", weights.astype(value.dtype), value)
    return out, sums
