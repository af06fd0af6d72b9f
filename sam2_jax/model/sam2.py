"""SAM 2: the parameters of all parts and the calls that the memory loop is made of.

Source: SAM 2 (arXiv 2408.00714), facebookresearch/sam2@2b90b9f sam2_base.py. What the reference
does over frames (memory bank, prompts, occlusion) is in memory.py, prompts.py and track.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray

from sam2_jax.model import layers
from sam2_jax.model.hiera import Hiera
from sam2_jax.model.kernels import XLA, Kernel, make_kernel
from sam2_jax.model.mask_decoder import MaskDecoder
from sam2_jax.model.memory_attention import Memories, MemoryAttention
from sam2_jax.model.memory_encoder import MemoryEncoder
from sam2_jax.model.neck import FpnNeck, ImageEncoder
from sam2_jax.model.position import sine_1d, sine_grid
from sam2_jax.model.prompt_encoder import PromptEncoder
from sam2_jax.model.variants import Variant, variant
from sam2_jax.types import Array, Decoded, Features, UserError

NUM_MEMORIES = 7  # one conditioning frame and six before the current one
VERSIONS = ("2.0", "2.1")
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet, RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)


class Sam2(nn.Module):
    """Parameters of SAM 2 and its parts as methods, called by `model.apply(..., method=...)`."""

    variant: Variant
    resolution: int  # side of the square input, in pixels
    version: str = "2.1"
    attention_dropout: float = 0.0  # on the weights of memory attention
    dropout: float = 0.0  # elsewhere in memory attention
    drop_path: float = 0.0  # stochastic depth of the trunk
    kernel: Kernel = XLA  # of large attentions

    def setup(self):
        v = self.variant
        small = nn.initializers.truncated_normal(0.02)
        trunk = Hiera(v, self.drop_path, self.kernel)
        self.image_encoder = ImageEncoder(trunk, FpnNeck(v.hidden_dim))
        self.memory_attention = MemoryAttention(
            v.hidden_dim,
            v.feedforward_dim,
            v.memory_layers,
            self.attention_dropout,
            self.dropout,
            self.kernel,
        )
        self.memory_encoder = MemoryEncoder(v.hidden_dim, v.memory_dim)
        self.sam_prompt_encoder = PromptEncoder(v.hidden_dim, self.resolution)
        self.sam_mask_decoder = MaskDecoder(v.hidden_dim, v.decoder_mlp_dim)
        self.mask_downsample = layers.Conv(1, 4, 4)
        self.obj_ptr_proj = layers.Mlp(v.hidden_dim, v.hidden_dim, 3)
        self.maskmem_tpos_enc = self.param("maskmem_tpos_enc", small, (NUM_MEMORIES, v.memory_dim))
        self.no_mem_embed = self.param("no_mem_embed", small, (v.hidden_dim,))
        # Read by nothing, as in the reference; kept so that checkpoints go both ways
        self.no_mem_pos_enc = self.param("no_mem_pos_enc", small, (v.hidden_dim,))
        self.no_obj_ptr = self.param("no_obj_ptr", small, (v.hidden_dim,))
        if self.version == "2.1":
            self.no_obj_embed_spatial = self.param("no_obj_embed_spatial", small, (v.memory_dim,))
            self.obj_ptr_tpos_proj = layers.dense(v.memory_dim)

    def encode_image(
        self, images: Float[Array, "n h w 3"], keys: Key[Array, " n"] | None = None
    ) -> Features:
        """Normalised images (see `normalise`) to features at strides 16, 8 and 4.

        `keys`, one for each image, are for stochastic depth; None: nothing is dropped.
        """
        decoder = self.sam_mask_decoder
        encode = self.image_encoder
        return Features(*encode(images, keys, decoder.conv_s0, decoder.conv_s1))

    def without_memory(self, top: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Features of a frame that is prompted without looking at any memory."""
        return top + self.no_mem_embed

    def with_memory(
        self,
        top: Float[Array, "b h w c"],
        memory: Float[Array, "b o k n d"],
        frames: Int[Array, " k"],
        pointers: Float[Array, "b o j c"],
        pointer_frames: Float[Array, " j"],
        count: Int[Array, ""],
        order: Int[Array, " k"],
        pointer_mask: Bool[Array, " j"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "b o h w c"]:
        """Features conditioned on memories and object pointers of every object.

        `frames` is each memory's row of the temporal code, `pointer_frames` each pointer's
        distance in time, over the largest there can be. Of the memories in that `order` the first
        `count` exist; of the pointers those of the mask, or without one the first `count`.
        """
        b, h, w, c = top.shape
        o, k, n, d = memory.shape[1:]
        split = c // d  # a pointer is cut into so many tokens
        if self.version == "2.1":
            time = self.obj_ptr_tpos_proj(sine_1d(pointer_frames, c))
        else:
            time = jnp.zeros((pointers.shape[2], d), memory.dtype)
        out = self.memory_attention(
            image=top.reshape(b, h * w, c),
            image_code=sine_grid(h, w, c).reshape(h * w, c),
            memories=Memories(
                frames=memory.reshape(b * o, k, n, d),
                temporal=self.maskmem_tpos_enc[frames],
                pointers=pointers.reshape(b * o, -1, d),
                times=jnp.repeat(time, split, 0),
                order=order,
                count=count,
                pointer_mask=None if pointer_mask is None else jnp.repeat(pointer_mask, split),
            ),
            deterministic=deterministic,
        )
        return out.reshape(b, o, h, w, c)

    def no_mask_prompt(self) -> Float[Array, " c"]:
        """Dense embedding where no mask is given."""
        return self.sam_prompt_encoder.no_mask()

    def mask_prompt(self, logits: Float[Array, "n h w"]) -> Float[Array, "n i j c"]:
        """Dense embedding of low-resolution mask logits."""
        return self.sam_prompt_encoder.mask(logits)

    def downsample_mask(self, mask: Float[Array, "n h w"]) -> Float[Array, "n i j"]:
        """Full-resolution 0/1 mask to low-resolution logits, learned."""
        return self.mask_downsample(mask[..., None])[..., 0]

    def decode(
        self,
        top: Float[Array, "n h w c"],
        s1: Float[Array, "b h1 w1 c1"],
        s0: Float[Array, "b h0 w0 c0"],
        points: Float[Array, "n p 2"],
        labels: Int[Array, "n p"],
        point_mask: Bool[Array, " p"],
        dense: Float[Array, "n h w c"],
    ) -> Decoded:
        """One pass of prompt encoder and mask decoder; points outside `point_mask` do not exist.

        The caller adds the reference's padding point (label -1).
        """
        tokens = self.sam_prompt_encoder.points(points, labels)
        code = self.sam_prompt_encoder.grid_code(top.shape[1])
        return self.sam_mask_decoder(top, s1, s0, code, tokens, point_mask, dense)

    def pointer(
        self, token: Float[Array, "*n c"], present: Bool[Array, "*n"]
    ) -> Float[Array, "*n c"]:
        """Object pointer of a mask token; where the object is absent, the learned stand-in."""
        return self.gate_pointer(self.obj_ptr_proj(token), present)

    def gate_pointer(
        self, pointer: Float[Array, "*n c"], present: Bool[Array, "*n"]
    ) -> Float[Array, "*n c"]:
        return jnp.where(present[..., None], pointer, self.no_obj_ptr)

    def encode_memory(
        self,
        top: Float[Array, "b h w c"],
        mask: Float[Array, "b o y x"],
        present: Bool[Array, "b o"],
    ) -> Float[Array, "b o n d"]:
        """Memory of a frame from its own (memory-free) features and full-resolution mask logits."""
        mask = (jax.nn.sigmoid(mask) * 20.0 - 10.0).astype(top.dtype)
        memory = self.memory_encoder(top, mask)
        if self.version == "2.1":
            absent = ~present[..., None, None, None]
            memory = memory + absent * self.no_obj_embed_spatial
        return memory.reshape(*memory.shape[:2], -1, memory.shape[-1])

    def touch_everything(self) -> None:
        """Straight-line use of every part, so that `init` creates every parameter."""
        size = self.resolution // 16
        images = jnp.zeros((1, self.resolution, self.resolution, 3))
        features = self.encode_image(images)
        mask = jnp.zeros((1, 1, self.resolution, self.resolution))
        present = jnp.ones((1, 1), bool)
        memory = self.encode_memory(features.top, mask, present)[:, :, None]
        pointer = jnp.zeros((1, 1, 1, self.variant.hidden_dim))
        zero, one = jnp.zeros(1, int), jnp.ones((), int)
        top = self.with_memory(features.top, memory, zero, pointer, jnp.zeros(1), one, zero, None)[
            :, 0
        ]
        dense = self.mask_prompt(self.downsample_mask(mask[:, 0])) + self.no_mask_prompt()
        points, labels = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), int)
        assert dense.shape[1] == size
        out = self.decode(top, features.s1, features.s0, points, labels, jnp.ones(1, bool), dense)
        self.pointer(out.tokens[:, 0], jnp.ones(1, bool))
        self.without_memory(top)


def make_sam2(
    name: str,
    resolution: int,
    version: str = "2.1",
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    kernel: Kernel | None = None,
) -> Sam2:
    """A SAM 2 of a named size. UserError for an unknown name, version or impossible resolution.

    `kernel` is the implementation of large attentions; None: what suits the first device.
    """
    if version not in VERSIONS:
        raise UserError(f"model.version {version!r} is unknown: expected one of {VERSIONS}.")
    if resolution <= 0 or resolution % 32:
        raise UserError(
            f"model.resolution {resolution} is not a positive multiple of 32: "
            f"try {max(32, round(resolution / 32) * 32)}."
        )
    kernel = make_kernel() if kernel is None else kernel
    return Sam2(variant(name), resolution, version, attention_dropout, dropout, drop_path, kernel)


def init_params(model: Sam2, key: PRNGKeyArray) -> dict:
    """Random parameters, a nested dict. Jitted: the compiler drops the forward pass."""
    small = model.clone(resolution=64)  # no parameter's shape depends on it
    return jax.jit(lambda k: small.init(k, method="touch_everything"))(key)["params"]


def normalise(images: Array, dtype) -> Float[Array, "*n h w 3"]:
    """uint8 RGB to ImageNet-normalised floats."""
    return ((jnp.asarray(images, jnp.float32) / 255.0 - MEAN) / STD).astype(dtype)
