"""Current features attend to themselves and to the memory bank.

Source: SAM 2 (arXiv 2408.00714, section 4), facebookresearch/sam2@2b90b9f memory_attention.py.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sam2_jax.model import growing, layers, norms
from sam2_jax.model.attention import attention
from sam2_jax.model.blockwise import BLOCKS, CPU_BLOCKS
from sam2_jax.model.draws import dropped, make_draw
from sam2_jax.model.kernels import FUSED, LARGE, XLA, Kernel, choose
from sam2_jax.model.position import rotary_table, rotate, sine_grid
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


class Memories(NamedTuple):
    """What is remembered of each of n objects, and what of it there is."""

    frames: Float[Array, "n k t d"]
    temporal: Float[Array, "k d"]  # code of each frame's distance in time
    pointers: Float[Array, "n p d"]  # object pointers, cut into tokens
    times: Float[Array, "p d"]  # code of each token's distance in time
    order: Int[Array, " k"]  # of the frames; the first `count` exist
    count: Int[Array, ""]  # at least 1
    pointer_mask: Bool[Array, " p"] | None  # None: of `count` frames the first pointers exist


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
        self, x: Float[Array, "n q c"], memories: Memories, deterministic: bool
    ) -> Float[Array, "n q c"]:
        n, tokens = x.shape[:2]
        table = jnp.asarray(rotary_table(int(tokens**0.5), self.dim))
        q = rotate(layers.dense(self.dim, "q_proj")(x), table)
        _, most, _, d = memories.frames.shape
        m = memories
        k_proj = layers.dense(self.dim, "k_proj")
        k_proj(m.pointers)  # for its parameters to be there; keys are made block by block
        k = k_proj.variables["params"]
        of = growing.Remembered(m.frames, m.temporal, m.pointers, m.times, k["kernel"], k["bias"])
        position = jnp.asarray(sine_grid(int(tokens**0.5), int(tokens**0.5), d).reshape(tokens, d))
        drops = bool(self.dropout) and not deterministic
        name = "xla"
        if tokens * most * tokens >= LARGE:
            name = choose(self.kernel, self.dim, q.dtype, drops, m.pointer_mask is not None)
        v_proj = layers.dense(self.dim, "v_proj")
        if name in FUSED:
            value = v_proj(self._fused(q, of, m, position, table))
        else:
            draw = None
            pointers = m.pointers.shape[1]
            if drops:
                keys = most * tokens + pointers
                draw = make_draw(self.make_rng("dropout"), n, 1, tokens, keys)
            mask = m.pointer_mask
            if mask is None:
                mask = jnp.arange(pointers) < m.count * (pointers // most)
            scope = growing.Scope(m.order, m.count, mask, position, table, draw)
            block = CPU_BLOCKS[1] if self.kernel.platform == "cpu" else BLOCKS[1]
            out, sums = growing.attend(q, of, scope, self.dropout, block)
            value = v_proj(out)
            if drops:
                value = value + (sums[..., None] - 1) * v_proj.variables["params"]["bias"]
        return layers.dense(self.dim, "out_proj")(value)

    def _fused(
        self,
        q: Float[Array, "n q c"],
        of: growing.Remembered,
        m: Memories,
        position: Float[Array, "t d"],
        table: Float[Array, "t 2 f"],
    ) -> Float[Array, "n q d"]:
        """One kernel of a static size for every number of frames."""
        n, most, tokens, d = of.memory.shape
        each = of.pointers.shape[1] // most

        def of_frames(count: int) -> Array:
            slots = m.order[:count]
            code = position + of.temporal[slots][:, None]
            frames = of.memory[:, slots].reshape(n, count * tokens, d)
            keys = growing.make_keys(of, frames, code.reshape(count * tokens, d))
            keys = rotate(keys.reshape(n, count, tokens, -1), table).reshape(*frames.shape[:2], -1)
            used = slice(None) if m.pointer_mask is not None else slice(count * each)
            pointers = of.pointers[:, used]
            mask = m.pointer_mask
            if mask is not None:
                mask = jnp.concatenate([jnp.ones(count * tokens, bool), mask])[None]
            keys = jnp.concatenate([keys, growing.make_keys(of, pointers, of.times[used])], 1)
            values = jnp.concatenate([frames, pointers], 1)
            out, _ = attention(
                q[:, :, None], keys[:, :, None], values[:, :, None], mask, kernel=self.kernel
            )
            return out[:, :, 0]

        # Recomputed in the backward pass: else the insides of all branches would be held
        branches = [jax.checkpoint(partial(of_frames, i + 1)) for i in range(most)]
        return jax.lax.switch(m.count - 1, branches)


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
        memories: Memories,
        deterministic: bool,
    ) -> Float[Array, "n q c"]:
        """Features of each of n = b * o objects, conditioned on that object's memories."""
        n, b = memories.frames.shape[0], image.shape[0]

        def drop(y):
            if deterministic or not self.dropout:
                return y
            draw = make_draw(self.make_rng("dropout"), y.shape[0], 1, *y.shape[1:])
            return dropped(y[:, None], draw, self.dropout)[:, 0]

        # The first self-attention sees the same features for every object of a video: once per
        # video is enough. In training the objects then share the draw on those weights (the
        # dropout of the output stays per object), a deviation from the reference.
        x = image + 0.1 * jnp.asarray(image_code)
        for i in range(self.num_layers):
            norm1 = norms.LayerNorm(1e-5, name=f"layers_{i}_norm1")
            attend = SelfAttention(
                self.dim, self.attention_dropout, self.kernel, name=f"layers_{i}_self_attn"
            )
            update = attend(norm1(x), deterministic)
            if i == 0:
                x, update = jnp.repeat(x, n // b, axis=0), jnp.repeat(update, n // b, axis=0)
            x = x + drop(update)
            y = norms.LayerNorm(1e-5, name=f"layers_{i}_norm2")(x)
            cross = CrossAttention(
                self.dim,
                self.attention_dropout,
                self.kernel,
                name=f"layers_{i}_cross_attn_image",
            )
            x = x + drop(cross(y, memories, deterministic))
            y = norms.LayerNorm(1e-5, name=f"layers_{i}_norm3")(x)
            y = drop(jax.nn.relu(layers.dense(self.feedforward, f"layers_{i}_linear1")(y)))
            x = x + drop(layers.dense(self.dim, f"layers_{i}_linear2")(y))
        return norms.LayerNorm(1e-5, name="norm")(x)
