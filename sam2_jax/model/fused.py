"""Attention in one kernel that keeps its weights on the chip: cuDNN's, and JAX's for TPUs.

Neither drops weights. See `kernels.refusal` for what else they cannot do.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Bool, Float

from sam2_jax.types import Array

LANES = 128  # of a TPU's vector registers; blocks are multiples of it
BLOCK = 512  # queries and keys of a step of the TPU's kernel


def cudnn(
    query: Float[Array, "n q heads d"],
    key: Float[Array, "n k heads d"],
    value: Float[Array, "n k heads dv"],
    key_mask: Bool[Array, "#n k"] | None,
) -> Float[Array, "n q heads dv"]:
    """`attention` by cuDNN, for float16 and bfloat16.

    JAX wants values as wide as keys: narrower ones are filled up with zeros, which costs as much as
    projecting them first would. A mask becomes a number for every weight.
    """
    missing = query.shape[-1] - value.shape[-1]
    wide = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)))
    mask = None
    if key_mask is not None:
        mask = jnp.broadcast_to(
            key_mask[:, None, None, :], (key_mask.shape[0], 1, query.shape[1], key.shape[1])
        )
    out = jax.nn.dot_product_attention(query, key, wide, mask=mask, implementation="cudnn")
    return out[..., : value.shape[-1]]


def flash(
    query: Float[Array, "n q heads d"],
    key: Float[Array, "n k heads d"],
    value: Float[Array, "n k heads dv"],
    key_mask: Bool[Array, "#n k"] | None,
    interpret: bool = False,
) -> Float[Array, "n q heads dv"]:
    """`attention` by JAX's splash attention for TPUs, which takes values narrower than keys.

    The compiler cannot split such a kernel over devices: of several, each calls it with its own
    share, inside `jax.shard_map`. `interpret` runs the kernel anywhere, slowly.
    """
    n, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    if key_mask is None:
        key_mask = jnp.ones((1, keys), bool)
    key_mask = jnp.broadcast_to(key_mask, (n, keys))
    run = _splash(queries, keys, query.shape[2], interpret)
    return run(query, key, value, key_mask)


def _splash(queries, keys, heads, interpret):
    """The kernel for these sizes; keys outside the mask, and those that fill up a block, have a
    number of their own, and only those of the same number as the queries count."""
    rows, columns = (min(BLOCK, -(-size // LANES) * LANES) for size in (queries, keys))
    more = -queries % rows, -keys % columns
    full = splash.FullMask((queries + more[0], keys + more[1]))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([full] * heads),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def run(query, key, value, key_mask):
        query = query * jnp.asarray(1.0 / math.sqrt(query.shape[-1]), query.dtype)
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, size), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
            for x, size in ((query, more[0]), (key, more[1]), (value, more[1]))
        )
        left_out = jnp.pad(~key_mask, ((0, 0), (0, more[1])), constant_values=True)
        zeros = jnp.zeros((query.shape[0], query.shape[2]), jnp.int32)
        out = jax.vmap(kernel)(
            query, key, value, splash.SegmentIds(zeros, left_out.astype("int32"))
        )
        assert isinstance(out, jax.Array)  # and not its residuals as well
        return out.transpose(0, 2, 1, 3)[:, :queries]

    return run
