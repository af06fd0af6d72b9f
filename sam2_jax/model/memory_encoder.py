"""A frame's features and its mask become a memory.

Source: facebookresearch/sam2@2b90b9f memory_encoder.py; the fuser is ConvNeXt's block.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from sam2_jax.model import layers, norms
from sam2_jax.types import Array


class MaskDownSampler(nn.Module):
    """Full-resolution mask down to stride 16, four halvings with four times the channels each."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 1"]) -> Float[Array, "n i j c"]:
        for i in range(4):
            x = layers.Conv(4 ** (i + 1), 3, 2, 1, name=f"conv_{i}")(x)
            x = layers.gelu(norms.LayerNorm2d(name=f"norm_{i}")(x))
        return layers.Conv(self.dim, 1, name="conv_4")(x)


class CXBlock(nn.Module):
    """ConvNeXt block: 7 x 7 depthwise, norm, MLP, scaled by a learned `gamma`."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        # fan-in of a depthwise kernel is its 49 taps: torch's uniform bound is 1/7
        kernel = self.param("dwconv_kernel", nn.initializers.uniform(2 / 7), (7, 7, 1, self.dim))
        bias = self.param("dwconv_bias", nn.initializers.zeros, (self.dim,))
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (self.dim,))
        y = layers.depthwise_conv(x.astype(kernel.dtype), kernel) + bias
        y = layers.dense(4 * self.dim, "pwconv1")(norms.LayerNorm2d(name="norm")(y))
        return x + gamma * layers.dense(self.dim, "pwconv2")(layers.gelu(y))


class MemoryEncoder(nn.Module):
    """Adds the mask to the (memory-free) image features, fuses, and narrows to `out` channels."""

    dim: int
    out: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w c"], mask: Float[Array, "b o y x"]
    ) -> Float[Array, "b o h w d"]:
        """`mask` is sigmoid(logits) * 20 - 10 at full resolution; features serve all objects."""
        b, o = mask.shape[:2]
        mask = mask.reshape(b * o, *mask.shape[2:], 1)
        down = MaskDownSampler(self.dim, name="mask_downsampler")(mask)
        image = layers.Conv(self.dim, 1, name="pix_feat_proj")(features)
        x = down.reshape(b, o, *down.shape[1:]) + image[:, None]
        x = x.reshape(down.shape)
        for i in range(2):
            x = CXBlock(self.dim, name=f"fuser_layers_{i}")(x)
        x = layers.Conv(self.out, 1, name="out_proj")(x)
        return x.reshape(b, o, *x.shape[1:]).astype(jnp.result_type(features))
