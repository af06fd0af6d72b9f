"""Hiera, the hierarchical vision transformer that is SAM 2's trunk.

Source: Hiera (arXiv 2306.00989), windowed position embedding (arXiv 2311.05613),
facebookresearch/sam2@2b90b9f backbones/hieradet.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from sam2_jax.model import layers, norms
from sam2_jax.model.attention import attention
from sam2_jax.model.kernels import XLA, Kernel
from sam2_jax.model.position import bicubic_matrix
from sam2_jax.model.variants import Variant
from sam2_jax.types import Array


def max_pool2(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """2 x 2 max pooling with stride 2; an odd last row or column is dropped, as in torch.

    Of equal numbers the first in reading order gets the gradient, as in torch; a reduction of JAX's
    would deal it out. Not a window: the gradient of XLA's pooling is 17 times slower on a CPU.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    rows = _larger(x[:, :, :, :, 0], x[:, :, :, :, 1])
    return _larger(rows[:, :, 0], rows[:, :, 1])


def _larger(first: Float[Array, "*n"], second: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def to_windows(
    x: Float[Array, "n h w c"], size: int, fill: Float[Array, " c"] | float = 0.0
) -> Float[Array, "m size size c"]:
    """Cut into windows of `size` x `size` tokens, padded with `fill` at the bottom and right.

    Padded tokens are not masked: they are keys like any other, as in the reference.
    """
    n, h, w, c = x.shape
    if h % size or w % size:
        x = jnp.pad(x, ((0, 0), (0, -h % size), (0, -w % size), (0, 0)))
        outside = (np.arange(x.shape[1]) >= h)[:, None] | (np.arange(x.shape[2]) >= w)
        x = jnp.where(outside[..., None], fill, x)
    rows, cols = x.shape[1] // size, x.shape[2] // size
    x = x.reshape(n, rows, size, cols, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, size, size, c)


def from_windows(
    x: Float[Array, "m size size c"], height: int, width: int
) -> Float[Array, "n h w c"]:
    """Put windows back together and cut the padding off."""
    size, c = x.shape[1], x.shape[-1]
    rows, cols = -(-height // size), -(-width // size)
    x = x.reshape(-1, rows, cols, size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * size, cols * size, c)[:, :height, :width]


def stochastic_depth(
    keys: Key[Array, " n"], rates: Float[np.ndarray, " l"]
) -> Float[Array, "n l 2"]:
    """What to multiply two branches of l blocks with: 0 at the rates, else 1 / (1 - rate).

    Drawn for each image by its own key, so that its draws are the same in whatever batch.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(rates), 2)))(keys)
    dropped = np.asarray(rates, np.float32)[:, None]
    return jnp.where(draws < dropped, 0.0, 1.0 / (1.0 - dropped))


class MultiScaleAttention(nn.Module):
    """Self-attention inside each window; queries are pooled where a stage begins."""

    dim_out: int
    num_heads: int
    window: int  # 0: attends to the whole image
    pool: bool
    kernel: Kernel = XLA

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        height, width = (s // 2 if self.pool else s for s in x.shape[1:3])
        project = layers.dense(3 * self.dim_out, "qkv")
        x = project(x)
        if self.window:
            # The reference pads before it projects; of zeros that leaves the bias
            x = to_windows(x, self.window, project.variables["params"]["bias"].astype(x.dtype))
        q, k, v = jnp.split(x, 3, axis=-1)
        if self.pool:
            q = max_pool2(q)

        def heads(y):
            return y.reshape(y.shape[0], y.shape[1] * y.shape[2], self.num_heads, -1)

        out, _ = attention(heads(q), heads(k), heads(v), kernel=self.kernel)
        out = out.reshape(q.shape)
        if self.window:
            # The window of the stage before; pooled queries leave half of it
            out = from_windows(out, height, width)
        return layers.dense(self.dim_out, "proj")(out)


class MultiScaleBlock(nn.Module):
    """Window attention and MLP; where `dim_out` differs a projected, pooled skip connection.

    `scale`: of the two branches of every image, see `stochastic_depth`.
    """

    dim_out: int
    num_heads: int
    window: int  # 0: attends to the whole image
    pool: bool
    kernel: Kernel = XLA

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], scale: Float[Array, "n 2"] | None
    ) -> Float[Array, "n i j d"]:
        def thinned(branch, y):
            return y if scale is None else y * scale[:, branch, None, None, None].astype(y.dtype)

        shortcut = x
        x = norms.LayerNorm(1e-6, name="norm1")(x)
        if self.dim_out != x.shape[-1]:
            shortcut = layers.dense(self.dim_out, "proj")(x)
            shortcut = max_pool2(shortcut) if self.pool else shortcut
        attend = MultiScaleAttention(
            self.dim_out, self.num_heads, self.window, self.pool, self.kernel, name="attn"
        )
        x = shortcut + thinned(0, attend(x))
        hidden = norms.LayerNorm(1e-6, name="norm2")(x)
        mlp = layers.Mlp(4 * self.dim_out, self.dim_out, 2, use_gelu=True, name="mlp")
        return x + thinned(1, mlp(hidden))


class Hiera(nn.Module):
    """Images to features at strides 4, 8, 16 and 32."""

    variant: Variant
    drop_path: float = 0.0
    kernel: Kernel = XLA

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"], keys: Key[Array, " n"] | None
    ) -> list[Float[Array, "n _ _ _"]]:
        v = self.variant
        x = layers.Conv(v.embed_dim, 7, 4, 3, name="patch_embed")(images)
        x = x + self._position(x.shape[1], x.shape[2])
        rates = np.linspace(0.0, self.drop_path, sum(v.stages))
        scales = None if keys is None else stochastic_depth(keys, rates)
        outputs, index = [], 0
        for stage, depth in enumerate(v.stages):
            for within in range(depth):
                first = stage > 0 and within == 0
                window = v.window_spec[stage - 1] if first else v.window_spec[stage]
                x = MultiScaleBlock(
                    dim_out=v.embed_dim * 2**stage,
                    num_heads=v.num_heads * 2**stage,
                    window=0 if index in v.global_blocks else window,
                    pool=first,
                    kernel=self.kernel,
                    name=f"blocks_{index}",
                )(x, None if scales is None or not rates[index] else scales[:, index])
                index += 1
            outputs.append(x)
        return outputs

    def _position(self, height: int, width: int) -> Float[Array, "h w c"]:
        """A coarse grid stretched over the image plus a window-sized one repeated over it."""
        v = self.variant
        zeros = nn.initializers.zeros
        side = v.window_spec[0]
        coarse = self.param("pos_embed", zeros, (v.background, v.background, v.embed_dim))
        tile = self.param("pos_embed_window", zeros, (side, side, v.embed_dim))
        rows = bicubic_matrix(height, v.background).astype(coarse.dtype)
        cols = bicubic_matrix(width, v.background).astype(coarse.dtype)
        stretched = jnp.einsum("hi,wj,ijc->hwc", rows, cols, coarse)
        return stretched + jnp.tile(tile, (height // side, width // side, 1))
