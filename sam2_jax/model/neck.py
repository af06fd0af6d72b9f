"""The feature pyramid between trunk and memory attention.

Source: facebookresearch/sam2@2b90b9f backbones/image_encoder.py (FpnNeck, scalp 1).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from sam2_jax.model import layers
from sam2_jax.types import Array


class FpnNeck(nn.Module):
    """Projects every stage to `dim`; stride 16 also receives stride 32, doubled by repetition."""

    dim: int

    @nn.compact
    def __call__(
        self, stages: list[Float[Array, "n _ _ _"]]
    ) -> tuple[Float[Array, "n h0 w0 c"], Float[Array, "n h1 w1 c"], Float[Array, "n h w c"]]:
        """Features at strides 4, 8 and 16."""
        # The reference numbers its convolutions from the coarsest stage
        s32, s16, s8, s4 = (
            layers.Conv(self.dim, 1, name=f"convs_{i}")(x) for i, x in enumerate(stages[::-1])
        )
        doubled = jnp.repeat(jnp.repeat(s32, 2, axis=1), 2, axis=2)
        return s4, s8, s16 + doubled


class ImageEncoder(nn.Module):
    """Trunk and neck."""

    trunk: nn.Module
    neck: nn.Module

    def __call__(self, images: Float[Array, "n h w 3"], deterministic: bool):
        return self.neck(self.trunk(images, deterministic))
