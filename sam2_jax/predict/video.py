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
from sam2_jax.decode import Inference, Prompt, Tracking, Visit
from sam2_jax.encode import encode_frames
from sam2_jax.model.sam2 import Sam2
from sam2_jax.products import multiplying
from sam2_jax.prompts import centre_click, noisy_box
from sam2_jax.track import empty_bank, visit_frame
from sam2_jax.types import Array, Bank

# As the reference's evaluation runs its predictor; memories in half the space are part of it.
PLAIN = Inference(from_low=True, memory_dtype=jnp.bfloat16)
# As its predictor is built by default, but for holes in masks, which it fills on GPUs only.
POSTPROCESSED = PLAIN._replace(stability=True, binarise=True)


class Tracked(NamedTuple):
    """Where a tracker is in its clip."""

    bank: Bank
    frame: Int[Array, ""]  # the next one


class Tracker(NamedTuple):
    """Tracking one frame at a time, for clips of any length; see `make_tracker`."""

    first: Callable[..., tuple[Tracked, Float[Array, "o h w"]]]
    first_points: Callable[..., tuple[Tracked, Float[Array, "o h w"]]]
    first_clicks: Callable[
        ..., tuple[Tracked, Float[Array, "o h w"], Float[Array, "o p 2"], Int[Array, "o p"]]
    ]
    next: Callable[..., tuple[Tracked, Float[Array, "o h w"]]]


def make_tracker(model: Sam2, inference: Inference = PLAIN, precision: str = "") -> Tracker:
    """Tracking from a first frame: it is given masks or points, `next` finds them on the others.

    `first(params, image, masks, num_frames)`, `first_points(params, image, points, labels,
    num_frames)`, `first_clicks(params, image, masks, num_frames, clicks=n)` and `next(params,
    state, image)` return a state and low-resolution mask logits (o, h/4, w/4). `first_clicks` is
    given the true masks and makes n clicks as someone would: in the middle of the object, then of
    the larger error that is left (the reference's `point_sampling_method="center"`); it also
    returns them, points and labels (-1: none) as `first_points` takes them. Images are
    uint8 (h, w, 3) at the model's resolution, masks boolean (o, h, w); points (o, p, 2) are x, y in
    pixels of the model's input, labels (o, p) are 1 on the object, 0 beside it, 2 and 3 for the
    corners of a box, which come first. `num_frames` is the length of
    the clip. With `precision` "float32" accelerators multiply in full; see `multiplying`.

    One program per number of objects serves all frames, another the points: nearly all frames have
    all the memories there can be, so that programs for fewer would cost more to compile than they
    save.
    """
    unbounded = memory.POINTER_WINDOW + 2  # longer than any window: nothing is sized by the clip

    def make_tracking(params, clicks: int = 0) -> Tracking:
        return Tracking(
            model,
            params,
            num_frames=unbounded,
            corrections=max(clicks - 1, 0),
            deterministic=True,
            click=centre_click,
            box=noisy_box,
            points=clicks > 0,
            inference=inference,
        )

    @multiplying(precision)
    def visit(params, state: Tracked, image, masks, is_cond, from_mask, prompt=None, clicks=0):
        tracking = make_tracking(params, clicks)
        key, zero = jax.random.key(0), jnp.zeros((), jnp.int32)  # nothing is drawn
        encoded = encode_frames(tracking, image[None, None], zero[None], key)
        features = jax.tree.map(lambda x: x[0], encoded)
        no = jnp.zeros((), bool)
        item = Visit(
            state.frame,
            features,
            masks[None],
            from_mask,
            is_cond,
            is_box=no,
            is_corrected=jnp.asarray(clicks > 1),
            from_truth=jnp.zeros(tracking.corrections, bool),
            remembered=jnp.ones((), bool),
        )
        bank, out = visit_frame(tracking, state.bank, item, key, prompt)
        clicked = (out.points[0], out.labels[0]) if clicks else ()
        return Tracked(bank, state.frame + 1), out.mask[0], *clicked

    @partial(jax.jit, donate_argnums=1)
    def visit_mask(params, state: Tracked, image, masks, is_first):
        return visit(params, state, image, masks, is_first, is_first)

    @partial(jax.jit, donate_argnums=1)
    def visit_points(params, state: Tracked, image, points, labels):
        masks = nothing(len(labels))
        prompt = Prompt(points[None], labels[None], jnp.int32(labels.shape[1]))
        yes = jnp.ones((), bool)
        return visit(params, state, image, masks, yes, ~yes, prompt)

    @partial(jax.jit, donate_argnums=1, static_argnames="clicks")
    def visit_clicks(params, state: Tracked, image, masks, clicks):
        yes = jnp.ones((), bool)
        return visit(params, state, image, masks, yes, ~yes, clicks=clicks)

    def nothing(objects: int):
        return jnp.zeros((objects, model.resolution, model.resolution), bool)

    def start(params, objects: int, num_frames) -> Tracked:
        side = model.resolution // 16
        top_shape = (1, side, side, model.variant.hidden_dim)
        bank = empty_bank(make_tracking(params), top_shape, objects, 1)
        distance = min(int(num_frames), memory.POINTER_WINDOW + 1) - 1
        bank = bank._replace(max_distance=jnp.asarray(distance, jnp.int32))
        return Tracked(bank, jnp.zeros((), jnp.int32))

    def first(params, image, masks, num_frames):
        state = start(params, masks.shape[0], num_frames)
        return visit_mask(params, state, image, jnp.asarray(masks), jnp.ones((), bool))

    def first_points(params, image, points, labels, num_frames):
        state = start(params, labels.shape[0], num_frames)
        points, labels = jnp.asarray(points, jnp.float32), jnp.asarray(labels, jnp.int32)
        return visit_points(params, state, image, points, labels)

    def first_clicks(params, image, masks, num_frames, clicks=1):
        state = start(params, masks.shape[0], num_frames)
        return visit_clicks(params, state, image, jnp.asarray(masks), clicks)

    def following(params, state, image):
        objects = state.bank.memory.values.shape[1]
        return visit_mask(params, state, image, nothing(objects), jnp.zeros((), bool))

    return Tracker(first, first_points, first_clicks, following)
