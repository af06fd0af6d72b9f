"""The memory bank: which frames are remembered, and what of them a frame attends to.

Entries fill the slots from the first on, and a new one takes the place of the oldest that no
later frame will read. So what exists is always a prefix, and attention over the first `count`
slots costs exactly what there is. Source: SAM 2 (arXiv 2408.00714, section 4, "memory bank"),
facebookresearch/sam2@2b90b9f sam2_base.py (_prepare_memory_conditioned_features).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from sam2_jax.types import Array, Bank, Slots

WINDOW = 6  # non-conditioning memories: the six frames before the current one
POINTER_WINDOW = 15  # non-conditioning pointers: the fifteen frames before


class Context(NamedTuple):
    """Memories and pointers that one frame attends to, as `Sam2.with_memory` takes them."""

    memory: Float[Array, "b o k n d"]
    frames: Int[Array, " k"]  # row of the temporal code
    pointers: Float[Array, "b o j c"]
    pointer_frames: Float[Array, " j"]  # signed distance in time over the largest there can be
    count: Int[Array, ""]  # so many memories exist, at least 1
    order: Int[Array, " k"]  # in which those come first
    pointer_mask: Bool[Array, " j"] | None  # pointers that exist; None: the first `count`


def empty(
    memory_shape: tuple[int, int, int, int],
    pointer_channels: int,
    num_frames: int,
    max_cond: int,
    dtype,
    pointer_dtype=None,
) -> Bank:
    """A bank for clips of `num_frames` with at most `max_cond` conditioning frames.

    `memory_shape` is (videos, objects, tokens, channels) of one frame's memory. Memories are kept
    in `dtype`, pointers too unless another is given.
    """

    def slots(window: int, dtype, *rest: int) -> Slots:
        size = min(num_frames, window + max_cond)
        b, o = memory_shape[:2]
        return Slots(
            values=jnp.zeros((b, o, size, *rest), dtype),
            frame=jnp.zeros(size, jnp.int32),
            is_cond=jnp.zeros(size, bool),
            count=jnp.zeros((), jnp.int32),
        )

    return Bank(
        memory=slots(WINDOW, dtype, *memory_shape[2:]),
        pointers=slots(POINTER_WINDOW, pointer_dtype or dtype, pointer_channels),
        max_distance=jnp.asarray(min(num_frames, POINTER_WINDOW + 1) - 1, jnp.int32),
    )


def write(
    bank: Bank,
    frame: Int[Array, ""],
    is_cond: Bool[Array, ""],
    memory: Float[Array, "b o n d"],
    pointer: Float[Array, "b o c"],
) -> Bank:
    """Remember a visited frame."""
    return bank._replace(
        memory=_put(bank.memory, frame, is_cond, memory, WINDOW),
        pointers=_put(bank.pointers, frame, is_cond, pointer, POINTER_WINDOW),
    )


def _put(slots: Slots, frame, is_cond, value, window: int) -> Slots:
    used = jnp.arange(slots.frame.shape[0]) < slots.count
    # The next frame looks back to frame + 1 - window
    expired = used & ~slots.is_cond & (slots.frame <= frame - window)
    oldest = jnp.argmin(jnp.where(expired, slots.frame, jnp.iinfo(jnp.int32).max))
    at = jnp.where(expired.any(), oldest, slots.count)
    return Slots(
        values=jax.lax.dynamic_update_index_in_dim(
            slots.values, value.astype(slots.values.dtype), at, axis=2
        ),
        frame=jnp.asarray(slots.frame).at[at].set(frame),
        is_cond=jnp.asarray(slots.is_cond).at[at].set(is_cond),
        count=slots.count + ~expired.any(),
    )


def outgrown(num_frames: int) -> bool:
    """Whether a clip is so long that memories linger out of sight, and what is read has a mask."""
    return num_frames - 1 > WINDOW + 1


def read(bank: Bank, frame: Int[Array, ""], num_frames: int) -> Context:
    """What `frame` attends to once there are memories.

    Clips of at most eight frames never outgrow the window: everything visited is in sight. In
    longer ones an entry may linger out of sight until it is replaced.
    """
    memory, pointers = bank.memory, bank.pointers
    size = min(num_frames - 1, memory.frame.shape[0])
    memory = _first(memory, size)
    pointers = _first(pointers, min(num_frames - 1, pointers.frame.shape[0]))
    order, count, pointer_mask = jnp.arange(size), memory.count, None
    if outgrown(num_frames):
        seen = _in_sight(memory, frame, WINDOW)
        order, count = jnp.argsort(~seen, stable=True), seen.sum(dtype=jnp.int32)
        pointer_mask = _in_sight(pointers, frame, POINTER_WINDOW)
    distance = frame - memory.frame
    # Row 6 is shared by all conditioning frames; row 0 is the frame just before, row 5 the oldest
    rows = jnp.where(memory.is_cond, WINDOW, jnp.clip(distance - 1, 0, WINDOW - 1))
    return Context(
        memory=memory.values,
        frames=rows,
        pointers=pointers.values,
        pointer_frames=(frame - pointers.frame) / bank.max_distance,
        count=count,
        order=order,
        pointer_mask=pointer_mask,
    )


def _first(slots: Slots, size: int) -> Slots:
    return Slots(slots.values[:, :, :size], slots.frame[:size], slots.is_cond[:size], slots.count)


def _in_sight(slots: Slots, frame: Int[Array, ""], window: int) -> Bool[Array, " k"]:
    """Which entries `frame` may see."""
    near = (slots.frame < frame) & (slots.frame >= frame - window)
    return (slots.is_cond | near) & (jnp.arange(slots.frame.shape[0]) < slots.count)
