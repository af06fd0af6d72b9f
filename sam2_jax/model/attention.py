"""Scaled dot-product attention as one function, written for what XLA does well."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from sam2_jax.types import Array


def attention(
    query: Float[Array, "n q heads d"],
    key: Float[Array, "n k heads d"],
    value: Float[Array, "n k heads dv"],
    key_mask: Bool[Array, "#n k"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "n q heads dv"], Float[Array, "n q heads 1"] | None]:
    """softmax(query key^T / sqrt(d)) value, the softmax in float32.

    `key_mask` leaves keys out exactly (weight 0). With a `dropout_key` the weights are dropped
    as in torch's scaled_dot_product_attention, and their sums are returned beside the output,
    so that a caller who projects the values afterwards can scale the bias; without, None.
    """
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * (1.0 / math.sqrt(query.shape[-1]))
    if key_mask is not None:
        logits = jnp.where(key_mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    sums = None
    if dropout_key is not None and dropout_rate > 0.0:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
        sums = weights.sum(-1).transpose(0, 2, 1)[..., None].astype(value.dtype)
    out = jnp.einsum("nhqk,nkhd->nqhd", weights.astype(value.dtype), value)
    return out, sums
