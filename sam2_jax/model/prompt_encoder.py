"""Points, boxes and masks become tokens and a dense embedding.

Source: facebookresearch/sam2@2b90b9f sam/prompt_encoder.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sam2_jax.model import layers, norms
from sam2_jax.model.position import fourier, fourier_grid
from sam2_jax.types import Array


class PromptEncoder(nn.Module):
    """Labels: 1 on the object, 0 off it, 2 and 3 the corners of a box, -1 no point."""

    dim: int
    resolution: int

    def setup(self):
        # A buffer of the reference, never trained: stop_gradient here, frozen by the optimizer
        self._gaussian = self.param(
            "gaussian", nn.initializers.normal(1.0), (2, self.dim // 2), jnp.float32
        )
        normal = nn.initializers.normal(1.0)
        self.point_embeddings = self.param("point_embeddings", normal, (4, self.dim))
        self.not_a_point_embed = self.param("not_a_point_embed", normal, (self.dim,))
        self.no_mask_embed = self.param("no_mask_embed", normal, (self.dim,))
        self.mask_downscaling = MaskDownscaling(self.dim)

    @property
    def gaussian(self) -> Float[Array, "2 f"]:
        return jax.lax.stop_gradient(self._gaussian).astype(jnp.float32)

    def points(
        self, points: Float[Array, "n p 2"], labels: Int[Array, "n p"]
    ) -> Float[Array, "n p c"]:
        """Tokens of points given in pixels of the model's input, x before y."""
        dtype = self.point_embeddings.dtype
        where = fourier((points + 0.5) / self.resolution, self.gaussian).astype(dtype)
        kinds = jax.nn.one_hot(labels, 4, dtype=dtype) @ self.point_embeddings
        return jnp.where((labels == -1)[..., None], self.not_a_point_embed, where + kinds)

    def mask(self, logits: Float[Array, "n h w"]) -> Float[Array, "n i j c"]:
        """Dense embedding of low-resolution mask logits."""
        return self.mask_downscaling(logits[..., None])

    def no_mask(self) -> Float[Array, " c"]:
        """Dense embedding that stands for "no mask given", the same at every place."""
        return self.no_mask_embed

    def grid_code(self, side: int) -> Float[Array, "h w c"]:
        """Position code of the image embedding's grid."""
        return fourier_grid(side, side, self.gaussian).astype(self.point_embeddings.dtype)


class MaskDownscaling(nn.Module):
    """Mask logits down to the image embedding's grid, 4 x smaller."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 1"]) -> Float[Array, "n i j c"]:
        x = layers.Conv(4, 2, 2, name="conv_0")(x)
        x = layers.gelu(norms.LayerNorm2d(name="norm_0")(x))
        x = layers.Conv(16, 2, 2, name="conv_1")(x)
        x = layers.gelu(norms.LayerNorm2d(name="norm_1")(x))
        return layers.Conv(self.dim, 1, name="conv_2")(x)
