"""Current features attend to themselves and to the memory bank.

Source: SAM 2 (arXiv 2408.00714, section 4), facebookresearch/sam2@2b90b9f memory_attention.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from sam2_jax.model import layers
from sam2_jax.model.attention import attention
from sam2_jax.model.kernels import XLA, Kernel
from sam2_jax.model.position import rotary_table, rotate
from sam2_jax.types import Array


class SelfAttention(nn.Module):
    """One head with rotary positions on queries and keys."""

    dim: int
    dropout: float
    kernel: Kernel = XLA

    @nn.compact
    def __call__(self, x: Float[Array, "n q c"], deterministic: bool) -> Float[Array, "n q c"]:
        table = jnp.asarray(rotary_table(int(x.shape[1] ** 0.5), self.dim))
        q = rotate(layers.dense(self.dim, "q_proj")(x), table)[:, :, None]
        k = rotate(layers.dense(self.dim, "k_proj")(x), table)[:, :, None]
        v = layers.dense(self.dim, "v_proj")(x)[:, :, None]
        key = None if deterministic or not self.dropout else self.make_rng("dropout")
        out, _ = attention(q, k, v, None, self.dropout, key, self.kernel)
        return layers.dense(self.dim, "out_proj")(out[:, :, 0])


class CrossAttention(nn.Module):
    """One head; rotary positions on queries and memories, none on pointers.

    Attends to the narrow memory itself and projects the result: softmax(..) (M W + b) equals
    (softmax(..) M) W + b, with a quarter of the work. Dropout makes the weights' sum differ
    from one, so the bias is scaled by it.
    """

    dim: int
    dropout: float
    kernel: Kernel = XLA

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n q c"],
        memory: Float[Array, "n k d"],
        memory_code: Float[Array, "#n k d"],
        num_pointer_tokens: int,
        key_mask: Bool[Array, "#n k"] | None,
        deterministic: bool,
    ) -> Float[Array, "n q c"]:
        n, tokens = x.shape[:2]
        table = jnp.asarray(rotary_table(int(tokens**0.5), self.dim))
        q = rotate(layers.dense(self.dim, "q_proj")(x), table)
        k = layers.dense(self.dim, "k_proj")(memory + memory_code)
        spatial = k.shape[1] - num_pointer_tokens
        frames = k[:, :spatial].reshape(n, spatial // tokens, tokens, self.dim)
        turned = rotate(frames, table).reshape(n, spatial, self.dim)
        k = jnp.concatenate([turned, k[:, spatial:]], 1)
        key = None if deterministic or not self.dropout else self.make_rng("dropout")
        out, sums = attention(
            q[:, :, None],
            k[:, :, None],
            memory[:, :, None],
            key_mask,
            self.dropout,
            key,
            self.kernel,
        )
        v_proj = layers.dense(self.dim, "v_proj")
        value = v_proj(out[:, :, 0])
        if sums is not None:
            value = value + (sums[:, :, 0] - 1) * v_proj.variables["params"]["bias"]
        return layers.dense(self.dim, "out_proj")(value)


class MemoryAttention(nn.Module):
    """Layers of self-attention, cross-attention to the memory, and feed-forward."""

    dim: int
    feedforward: int
    num_layers: int
    attention_dropout: float
    dropout: float
    kernel: Kernel = XLA

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b q c"],
        image_code: Float[np.ndarray, "q c"],
        memory: Float[Array, "n k d"],
        memory_code: Float[Array, "#n k d"],
        num_pointer_tokens: int,
        key_mask: Bool[Array, "#n k"] | None,
        deterministic: bool,
    ) -> Float[Array, "n q c"]:
        """Features of each of n = b * o objects, conditioned on that object's memory.

        The last `num_pointer_tokens` of `memory` are object pointers; the rest are whole frames.
        """
        n, b = memory.shape[0], image.shape[0]

        def drop(y):
            return nn.Dropout(self.dropout, deterministic=deterministic)(y)

        # The first self-attention sees the same features for every object of a video: once per
        # video is enough. In training the objects then share the draw on those weights (the
        # dropout of the output stays per object), a deviation from the reference.
        x = image + 0.1 * jnp.asarray(image_code)
        for i in range(self.num_layers):
            norm1 = layers.layer_norm(1e-5, f"layers_{i}_norm1")
            attend = SelfAttention(
                self.dim, self.attention_dropout, self.kernel, name=f"layers_{i}_self_attn"
            )
            update = attend(norm1(x), deterministic)
            if i == 0:
                x, update = jnp.repeat(x, n // b, axis=0), jnp.repeat(update, n // b, axis=0)
            x = x + drop(update)
            y = layers.layer_norm(1e-5, f"layers_{i}_norm2")(x)
            cross = CrossAttention(
                self.dim,
                self.attention_dropout,
                self.kernel,
                name=f"layers_{i}_cross_attn_image",
            )
            x = x + drop(cross(y, memory, memory_code, num_pointer_tokens, key_mask, deterministic))
            y = layers.layer_norm(1e-5, f"layers_{i}_norm3")(x)
            y = drop(jax.nn.relu(layers.dense(self.feedforward, f"layers_{i}_linear1")(y)))
            x = x + drop(layers.dense(self.dim, f"layers_{i}_linear2")(y))
        return layers.layer_norm(1e-5, "norm")(x)
