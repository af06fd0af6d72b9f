"""Bilinear resizing of mask logits, as torch's interpolate with align_corners=False.

Two products with fixed matrices, written so that XLA transposes nothing at full resolution
(jax.image.resize gives the same numbers with two copies of the large array).
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sam2_jax.types import Array


@functools.lru_cache
def bilinear_matrix(out_size: int, in_size: int) -> Float[np.ndarray, "o i"]:
    """Weights along one axis: a triangle as wide as the larger step (antialiased reduction)."""
    scale = in_size / out_size
    centre = (np.arange(out_size) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(in_size)[None] - centre[:, None])
    weights = np.maximum(0.0, 1.0 - distance / max(scale, 1.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(logits: Float[Array, "*n h w"], size: Sequence[int]) -> Float[Array, "*n y x"]:
    """Bilinear interpolation up, antialiased bilinear reduction down, to (height, width)."""
    rows, cols = (
        jnp.asarray(bilinear_matrix(new, old), logits.dtype)
        for new, old in zip(size, logits.shape[-2:], strict=True)
    )
    wide = logits @ cols.T
    return jnp.broadcast_to(rows, (*logits.shape[:-2], *rows.shape)) @ wide
