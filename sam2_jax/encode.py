"""Image features of all frames of a clip: at once, one frame at a time, or on several devices.

They see nothing of each other, so how they are grouped is a matter of memory and speed alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int, PRNGKeyArray, UInt8

from sam2_jax.decode import Tracking
from sam2_jax.model.sam2 import normalise
from sam2_jax.types import Array, Features

STRIDE = 16  # of the features that are remembered


class Shared(NamedTuple):
    """Devices that work on the same videos, inside `jax.shard_map`: a mesh axis and its size."""

    axis: str
    size: int


def encode_frames(
    tracking: Tracking,
    images: UInt8[Array, "t b h w 3"],
    frames: Int[Array, " t"],
    key: PRNGKeyArray,
    one_by_one: bool = False,
    shared_by: Shared | None = None,
) -> Features:
    """Features of images, leading axes (t, b).

    `one_by_one`: nothing is kept for the backward pass, which encodes each frame again when it
    comes to it: the insides of one frame at a time are in memory, not those of all. Of devices
    that share the videos each encodes some of the frames.
    """

    def encode(images: Array, keys: Array) -> Features:
        pixels = normalise(images, compute_dtype(tracking.params))
        return tracking.call("encode_image", pixels, None if tracking.deterministic else keys)

    t, b = images.shape[:2]
    keys = jax.vmap(lambda frame: jax.random.split(jax.random.fold_in(key, frame), b))(frames)
    if shared_by:
        each = -(-t // shared_by.size)  # where they do not come out even, some are encoded twice
        start = jnp.minimum(jax.lax.axis_index(shared_by.axis) * each, t - min(each, t))
        images, keys = (jax.lax.dynamic_slice_in_dim(x, start, each) for x in (images, keys))
    if one_by_one:
        features = jax.lax.map(lambda item: jax.checkpoint(encode)(*item), (images, keys))
    else:
        # One batch, not a map over frames: of which products over two axes would be the gradients
        flat = encode(*(x.reshape(-1, *x.shape[2:]) for x in (images, keys)))
        features = jax.tree.map(lambda x: x.reshape(-1, b, *x.shape[1:]), flat)
    if not shared_by:
        return features
    place = jnp.arange(t)
    owner = jnp.minimum(place // each, shared_by.size - 1)
    begins = jnp.minimum(owner * each, t - min(each, t))
    rows = owner * each + place - begins
    gathered = jax.tree.map(
        lambda x: jax.lax.all_gather(x, shared_by.axis, axis=0, tiled=True), features
    )
    return jax.tree.map(lambda x: x[rows], gathered)


def compute_dtype(params: dict):
    """The dtype of kernels, in which products are computed and memories kept."""
    return params["mask_downsample"]["kernel"].dtype
