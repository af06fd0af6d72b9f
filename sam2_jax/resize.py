"""Bilinear resizing of mask logits, as torch's interpolate with align_corners=False."""

import jax
from jaxtyping import Float

from sam2_jax.types import Array


def upsample(logits: Float[Array, "*n h w"], size: tuple[int, int]) -> Float[Array, "*n y x"]:
    """Bilinear interpolation to a larger (height, width)."""
    return jax.image.resize(logits, (*logits.shape[:-2], *size), "linear", antialias=False)


def downsample(logits: Float[Array, "*n y x"], size: tuple[int, int]) -> Float[Array, "*n h w"]:
    """Antialiased bilinear reduction to a smaller (height, width)."""
    return jax.image.resize(logits, (*logits.shape[:-2], *size), "linear", antialias=True)
