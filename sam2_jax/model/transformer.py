"""The two-way transformer of the mask decoder: prompt tokens and image attend to each other.

Source: SAM 1 (arXiv 2304.02643, section 3), facebookresearch/sam2@2b90b9f sam/transformer.py.
"""

import flax.linen as nn
from jaxtyping import Bool, Float

from sam2_jax.model import layers, norms
from sam2_jax.model.attention import attention
from sam2_jax.types import Array


class Attention(nn.Module):
    """Multi-head attention with projections to `inner` channels."""

    inner: int
    num_heads: int
    out: int

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "n q c"],
        key: Float[Array, "n k c"],
        value: Float[Array, "n k c"],
        key_mask: Bool[Array, "#n k"] | None = None,
    ) -> Float[Array, "n q c"]:
        def heads(x, name):
            x = layers.dense(self.inner, name)(x)
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        q, k, v = heads(query, "q_proj"), heads(key, "k_proj"), heads(value, "v_proj")
        out, _ = attention(q, k, v, key_mask)
        return layers.dense(self.out, "out_proj")(out.reshape(*out.shape[:2], self.inner))


class TwoWayBlock(nn.Module):
    """Tokens to tokens, tokens to image, MLP on tokens, image to tokens."""

    dim: int
    mlp_dim: int
    first: bool  # the first block's self-attention has neither position codes nor a residual

    @nn.compact
    def __call__(self, tokens, image, token_code, image_code, token_mask):
        def attend(inner, name):
            return Attention(inner, 8, self.dim, name=name)

        def norm(name):
            return norms.LayerNorm(1e-5, name=name)

        if self.first:
            tokens = attend(self.dim, "self_attn")(tokens, tokens, tokens, token_mask)
        else:
            q = tokens + token_code
            tokens = tokens + attend(self.dim, "self_attn")(q, q, tokens, token_mask)
        tokens = norm("norm1")(tokens)

        across = attend(self.dim // 2, "cross_attn_token_to_image")
        tokens = tokens + across(tokens + token_code, image + image_code, image)
        tokens = norm("norm2")(tokens)

        tokens = tokens + layers.Mlp(self.mlp_dim, self.dim, 2, name="mlp")(tokens)
        tokens = norm("norm3")(tokens)

        back = attend(self.dim // 2, "cross_attn_image_to_token")
        image = image + back(image + image_code, tokens + token_code, tokens, token_mask)
        return tokens, norm("norm4")(image)


class TwoWayTransformer(nn.Module):
    """Two blocks and a last look of the tokens at the image."""

    dim: int
    mlp_dim: int

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "n p c"],
        image: Float[Array, "n k c"],
        image_code: Float[Array, "#n k c"],
        token_mask: Bool[Array, "#n p"] | None,
    ) -> tuple[Float[Array, "n p c"], Float[Array, "n k c"]]:
        """Tokens and image after attention; tokens outside `token_mask` influence nothing."""
        code = tokens
        for i in range(2):
            block = TwoWayBlock(self.dim, self.mlp_dim, first=i == 0, name=f"layers_{i}")
            tokens, image = block(tokens, image, code, image_code, token_mask)
        last = Attention(self.dim // 2, 8, self.dim, name="final_attn_token_to_image")
        tokens = tokens + last(tokens + code, image + image_code, image)
        return norms.LayerNorm(1e-5, name="norm_final_attn")(tokens), image
