"""Bilinear resizing of mask logits, as torch's interpolate with align_corners=False.

Enlarging by a whole number, which is nearly all that happens, is a weighted sum of two neighbours
for each of few phases. Anything else is two products with fixed matrices, written so that XLA
transposes nothing at full resolution (jax.image.resize gives the same numbers with two copies of
the large array).
"""

import functools
from collections.abc import Sequence

import jax
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
    height, width = logits.shape[-2:]
    if size[0] % height == 0 and size[1] % width == 0:
        wide = enlarge(logits, size[1] // width, logits.ndim - 1)
        return enlarge(wide, size[0] // height, logits.ndim - 2)
    rows, cols = (
        jnp.asarray(bilinear_matrix(new, old), logits.dtype)
        for new, old in zip(size, logits.shape[-2:], strict=True)
    )
    wide = logits @ cols.T
    return jnp.broadcast_to(rows, (*logits.shape[:-2], *rows.shape)) @ wide


def enlarge(x: Float[Array, "*n"], factor: int, axis: int) -> Float[Array, "*m"]:
    """Bilinear interpolation of one axis to `factor` times its length; borders are repeated."""
    if factor == 1:
        return x
    edges = jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)], mode="edge")
    before, after = (
        jax.lax.slice_in_dim(edges, start, start + x.shape[axis], axis=axis) for start in (0, 2)
    )
    shifts = [(phase + 0.5) / factor - 0.5 for phase in range(factor)]  # from x's own places
    phases = [x + abs(s) * ((before if s < 0 else after) - x) for s in shifts]
    shape = (*x.shape[:axis], factor * x.shape[axis], *x.shape[axis + 1 :])
    return jnp.stack(phases, axis + 1).reshape(shape)
