"""The feature pyramid between trunk and memory attention.

Source: facebookresearch/sam2@2b90b9f backbones/image_encoder.py (FpnNeck, scalp 1).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Key

from sam2_jax.model import layers
from sam2_jax.types import Array


class FpnNeck(nn.Module):
    """Projects every stage to `dim`; stride 16 also receives stride 32, doubled by repetition."""

    dim: int

    def setup(self):
        # The reference numbers them from the coarsest stage
        self.convs = [layers.Conv(self.dim, 1) for _ in range(4)]

    def __call__(
        self,
        stages: list[Float[Array, "n _ _ _"]],
        conv_s0: layers.Conv,
        conv_s1: layers.Conv,
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n h1 w1 c1"], Float[Array, "n h0 w0 c0"]]:
        """Features at stride 16, and at 8 and 4 as the mask decoder's convolutions narrow them.

        The wide features at strides 8 and 4, which nothing else reads, are never made.
        """
        s4, s8, s16, s32 = stages
        coarse = self.convs[0](s32)
        doubled = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
        top = self.convs[1](s16) + doubled
        return top, conv_s1.after(self.convs[2], s8), conv_s0.after(self.convs[3], s4)


class ImageEncoder(nn.Module):
    """Trunk and neck."""

    trunk: nn.Module
    neck: nn.Module

    def __call__(
        self,
        images: Float[Array, "n h w 3"],
        keys: Key[Array, " n"] | None,
        conv_s0: layers.Conv,
        conv_s1: layers.Conv,
    ) -> tuple[Float[Array, "n i j c"], Float[Array, "n h1 w1 c1"], Float[Array, "n h0 w0 c0"]]:
        """As the neck; the convolutions are the mask decoder's."""
        return self.neck(self.trunk(images, keys), conv_s0, conv_s1)
