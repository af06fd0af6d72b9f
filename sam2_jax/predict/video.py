"""Tracking through a video one frame at a time, of any length, in bounded memory.

Source: facebookresearch/sam2@2b90b9f sam2_video_predictor.py (semi-supervised use).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sam2_jax import memory
from sam2_jax.decode import Tracking, Visit
from sam2_jax.model.sam2 import Sam2
from sam2_jax.prompts import noisy_box, uniform_click
from sam2_jax.track import empty_bank, encode_frames, visit_frame
from sam2_jax.types import Array, Bank


class Tracked(NamedTuple):
    """Where a tracker is in its clip."""

    bank: Bank
    frame: Int[Array, ""]  # the next one


class Tracker(NamedTuple):
    """Tracking one frame at a time, for clips of any length."""

    first: Callable[..., tuple[Tracked, Float[Array, "o h w"]]]
    next: Callable[..., tuple[Tracked, Float[Array, "o h w"]]]


def make_tracker(model: Sam2) -> Tracker:
    """Semi-supervised tracking: `first` is given masks, `next` finds them on the frames after.

    `first(params, image, masks, num_frames)` and `next(params, state, image)` return a state and
    low-resolution mask logits (o, h/4, w/4). Images are uint8 (h, w, 3) at the model's
    resolution, masks boolean (o, h, w); `num_frames` is the length of the clip. One program per
    number of objects serves both: nearly all frames have all the memories there can be, so that
    programs for fewer would cost more to compile than they save.
    """
    unbounded = memory.POINTER_WINDOW + 2  # longer than any window: nothing is sized by the clip

    def make_tracking(params) -> Tracking:
        return Tracking(
            model,
            params,
            num_frames=unbounded,
            corrections=0,
            deterministic=True,
            click=uniform_click,
            box=noisy_box,
            exact=False,
            points=False,
            stability=True,
        )

    @partial(jax.jit, donate_argnums=1)
    def visit(params, state: Tracked, image, masks, is_first):
        tracking = make_tracking(params)
        key = jax.random.key(0)  # nothing is drawn
        features = jax.tree.map(lambda x: x[0], encode_frames(tracking, image[None, None], key))
        no = jnp.zeros((), bool)
        item = Visit(
            state.frame, features, masks[None], is_first, is_first, no, no, jnp.zeros(0, bool)
        )
        bank, out = visit_frame(tracking, state.bank, item, key)
        return Tracked(bank, state.frame + 1), out.mask[0]

    def first(params, image, masks, num_frames):
        side = model.resolution // 16
        top_shape = (1, side, side, model.variant.hidden_dim)
        bank = empty_bank(make_tracking(params), top_shape, masks.shape[0], 1)
        distance = min(int(num_frames), memory.POINTER_WINDOW + 1) - 1
        bank = bank._replace(max_distance=jnp.asarray(distance, jnp.int32))
        state = Tracked(bank, jnp.zeros((), jnp.int32))
        return visit(params, state, image, jnp.asarray(masks), jnp.ones((), bool))

    def following(params, state, image):
        objects = state.bank.memory.values.shape[1]
        nothing = jnp.zeros((objects, model.resolution, model.resolution), bool)
        return visit(params, state, image, nothing, jnp.zeros((), bool))

    return Tracker(first, following)
