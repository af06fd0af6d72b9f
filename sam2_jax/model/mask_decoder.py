"""Tokens and image features become masks, their predicted IoU and an object score.

Source: facebookresearch/sam2@2b90b9f sam/mask_decoder.py.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float

from sam2_jax.model import layers, norms
from sam2_jax.model.transformer import TwoWayTransformer
from sam2_jax.types import Array, Decoded


class MaskDecoder(nn.Module):
    """SAM's mask decoder with high-resolution skips and an object-score token."""

    dim: int
    mlp_dim: int

    def setup(self):
        normal = nn.initializers.normal(1.0)
        self.obj_score_token = self.param("obj_score_token", normal, (1, self.dim))
        self.iou_token = self.param("iou_token", normal, (1, self.dim))
        self.mask_tokens = self.param("mask_tokens", normal, (4, self.dim))
        self.transformer = TwoWayTransformer(self.dim, self.mlp_dim)
        self.conv_s0 = layers.Conv(self.dim // 8, 1)
        self.conv_s1 = layers.Conv(self.dim // 4, 1)
        self.upscale_0 = layers.Upsample2(self.dim // 4)
        self.upscale_norm = norms.LayerNorm2d()
        self.upscale_1 = layers.Upsample2(self.dim // 8)
        self.output_hypernetworks_mlps = [layers.Mlp(self.dim, self.dim // 8, 3) for _ in range(4)]
        self.iou_prediction_head = layers.Mlp(256, 4, 3, use_sigmoid=True)
        self.pred_obj_score_head = layers.Mlp(self.dim, 1, 3)

    def __call__(
        self,
        image: Float[Array, "n h w c"],
        s1: Float[Array, "b h1 w1 c1"],
        s0: Float[Array, "b h0 w0 c0"],
        image_code: Float[Array, "h w c"],
        prompt_tokens: Float[Array, "n p c"],
        prompt_mask: Bool[Array, " p"],
        dense: Float[Array, "n h w c"],
    ) -> Decoded:
        """All four mask tokens at once; n = b * objects rows, `s1` and `s0` shared by objects."""
        n, h, w, c = image.shape
        own = jnp.concatenate([self.obj_score_token, self.iou_token, self.mask_tokens])
        tokens = jnp.concatenate([jnp.tile(own[None], (n, 1, 1)), prompt_tokens], 1)
        mask = jnp.concatenate([jnp.ones(6, bool), prompt_mask])[None]
        source = (image + dense).reshape(n, h * w, c)
        tokens, source = self.transformer(tokens, source, image_code.reshape(1, h * w, c), mask)

        def add_shared(x, shared):
            """Add a video's features to the rows of each of its objects."""
            grouped = x.reshape(shared.shape[0], -1, *x.shape[1:])
            return (grouped + shared[:, None]).reshape(x.shape)

        x = add_shared(self.upscale_0(source.reshape(image.shape)), s1)
        x = layers.gelu(self.upscale_norm(x))
        x = layers.gelu(add_shared(self.upscale_1(x), s0))
        mask_tokens = tokens[:, 2:6]
        hyper = [mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        # Pixels as one axis: see `layers.product`
        masks = jnp.einsum("nmc,npc->nmp", jnp.stack(hyper, 1), x.reshape(n, -1, x.shape[-1]))
        masks = masks.reshape(n, 4, *x.shape[1:3])
        return Decoded(
            masks=masks.astype(jnp.float32),
            ious=self.iou_prediction_head(tokens[:, 1]).astype(jnp.float32),
            tokens=mask_tokens,
            object_score=self.pred_obj_score_head(tokens[:, 0])[:, 0].astype(jnp.float32),
        )
