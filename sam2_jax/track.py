"""Tracking objects through a clip: the memory loop over frames as one `lax.scan`.

Source: SAM 2 (arXiv 2408.00714), facebookresearch/sam2@2b90b9f training/model/sam2.py
(forward_tracking, track_step, _iter_correct_pt_sampling) and sam2_base.py (_forward_sam_heads,
_use_mask_as_output).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from sam2_jax import memory
from sam2_jax.model.sam2 import Sam2, normalise
from sam2_jax.prompts import BoxSampler, PointSampler, noisy_box, uniform_click
from sam2_jax.resize import downsample, upsample
from sam2_jax.types import Array, Bank, Batch, Features, FrameOut, PromptPlan

NO_OBJECT = -1024.0  # mask logit of an object that is predicted absent
GIVEN = 10.0  # logits of a mask that was given: +-10


class Visit(NamedTuple):
    """What one step of the scan is given about its frame."""

    frame: Int[Array, ""]
    features: Features
    truth: Bool[Array, "b o h w"]
    from_mask: Bool[Array, ""]
    is_cond: Bool[Array, ""]
    is_box: Bool[Array, ""]
    is_corrected: Bool[Array, ""]
    from_truth: Bool[Array, " s"]


class Prompt(NamedTuple):
    """Point slots of which the first `count` are in use."""

    points: Float[Array, "b o p 2"]
    labels: Int[Array, "b o p"]
    count: Int[Array, ""]


class Prediction(NamedTuple):
    """One decoder pass after choosing among its masks."""

    masks: Float[Array, "b o 3 h w"]  # the multimask output, or the single mask at 0
    ious: Float[Array, "b o 3"]
    is_multi: Bool[Array, ""]
    mask: Float[Array, "b o h w"]  # the chosen one
    token: Float[Array, "b o c"]  # its mask token
    object_score: Float[Array, "b o"]


class Tracking(NamedTuple):
    """What stays the same over all visits: the model, its parameters and how to sample."""

    model: Sam2
    params: dict
    num_frames: int
    corrections: int
    deterministic: bool
    click: PointSampler
    box: BoxSampler

    def call(self, method: str, *args, rngs: dict | None = None, **kwargs):
        return self.model.apply({"params": self.params}, *args, method=method, rngs=rngs, **kwargs)


def track(
    model: Sam2,
    params: dict,
    batch: Batch,
    plan: PromptPlan,
    key: PRNGKeyArray,
    *,
    deterministic: bool = False,
    max_cond: int = 2,
    click: PointSampler = uniform_click,
    box: BoxSampler = noisy_box,
    remat: str = "none",
) -> FrameOut:
    """Segment every object on every frame of a batch of clips, prompted as the plan says.

    Args:
      batch: uint8 images at the model's resolution, ground truth (read for prompts).
      plan: from `prompts.sample_plan`; its `from_truth` says how many correction clicks.
      key: for dropout and the coordinates of prompts.
      max_cond: the most frames that may become conditioning frames.
      click, box: samplers, replaceable (`prompts.centre_click` for evaluation).
      remat: what the backward pass computes again: "none"; "frame": each visit; "full": also
        the image encoder.

    Returns outputs with a leading axis of frames, in frame order.
    """
    b, t = batch.images.shape[:2]
    tracking = Tracking(model, params, t, plan.from_truth.shape[1], deterministic, click, box)
    key, encoder_key = jax.random.split(key)
    encode = partial(encode_frames, tracking)
    features = (jax.checkpoint(encode) if remat == "full" else encode)(batch.images, encoder_key)
    by_frame = Visit(
        frame=jnp.arange(t, dtype=jnp.int32),
        features=features,
        truth=batch.masks.swapaxes(0, 1),
        from_mask=plan.is_cond & ~plan.use_points,
        is_cond=plan.is_cond,
        is_box=plan.is_box,
        is_corrected=plan.is_corrected,
        from_truth=plan.from_truth,
    )
    visits = jax.tree.map(lambda x: x[plan.order], by_frame)
    bank = empty_bank(tracking, features.top.shape[1:], batch.masks.shape[2], max_cond)

    def body(bank, visit):
        return visit_frame(tracking, bank, visit, jax.random.fold_in(key, visit.frame))

    _, outs = jax.lax.scan(body if remat == "none" else jax.checkpoint(body), bank, visits)
    return jax.tree.map(lambda x: x[jnp.argsort(plan.order)], outs)


def visit_frame(
    tracking: Tracking, bank: Bank, visit: Visit, key: PRNGKeyArray
) -> tuple[Bank, FrameOut]:
    """Visit one frame: look at what is remembered, predict, correct, remember."""
    memory_key, prompt_key, click_key = jax.random.split(key, 3)
    top = condition(tracking, bank, visit, memory_key)
    prompt = first_prompt(tracking, visit, prompt_key)
    first = predict(tracking, visit, top, prompt, dense_prompt(tracking, visit), prompt.count < 2)
    last, prompt, later = correct(tracking, visit, top, prompt, first, click_key)
    out = finish(tracking, visit, first, last, prompt, later)
    is_cond = visit.is_cond | visit.is_corrected
    return memory.write(bank, visit.frame, is_cond, out.memory, out.pointer), out


def encode_frames(tracking: Tracking, images: Array, key: PRNGKeyArray) -> Features:
    """Features of all frames, leading axes (t, b)."""
    b, t = images.shape[:2]
    flat = normalise(images.reshape(b * t, *images.shape[2:]), compute_dtype(tracking.params))
    rngs = {"dropout": key}
    features = tracking.call("encode_image", flat, tracking.deterministic, rngs=rngs)
    return jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]).swapaxes(0, 1), features)


def compute_dtype(params: dict):
    """The dtype that parameters, and so everything computed from them, are in."""
    return params["no_mem_embed"].dtype


def empty_bank(tracking: Tracking, top_shape: tuple[int, ...], objects: int, max_cond: int) -> Bank:
    """An empty bank for features of shape (videos, height, width, channels)."""
    b, h, w, c = top_shape
    shape = (b, objects, h * w, tracking.model.variant.memory_dim)
    dtype = compute_dtype(tracking.params)
    return memory.empty(shape, c, tracking.num_frames, max_cond, dtype)


def condition(
    tracking: Tracking, bank: Bank, visit: Visit, key: PRNGKeyArray
) -> Float[Array, "b o h w c"]:
    """Features of the frame in the light of the memories; prompted frames look at none."""
    top = visit.features.top
    objects = visit.truth.shape[1]

    def alone():
        # A frame whose mask is given keeps its raw features
        plain = jnp.where(visit.from_mask, top, tracking.call("without_memory", top))
        return jnp.repeat(plain[:, None], objects, 1)

    def remembering(count: int):
        context = memory.read(bank, visit.frame, count, tracking.num_frames)
        return tracking.call(
            "with_memory",
            top,
            *context,
            deterministic=tracking.deterministic,
            rngs={"dropout": key},
        )

    most = min(tracking.num_frames - 1, bank.memory.frame.shape[0])
    branches = [alone] + [partial(remembering, count) for count in range(1, most + 1)]
    return jax.lax.switch(jnp.where(visit.is_cond, 0, bank.memory.count), branches)


def first_prompt(tracking: Tracking, visit: Visit, key: PRNGKeyArray) -> Prompt:
    """A click or a box where the plan gives one, else no points."""
    b, o = visit.truth.shape[:2]
    slots = 2 + tracking.corrections if tracking.corrections else 1
    none = Prompt(jnp.zeros((b, o, slots, 2)), jnp.full((b, o, slots), -1, jnp.int32), jnp.int32(0))
    if not tracking.corrections:
        return none

    def put(points, labels, count: int):
        return Prompt(
            none.points.at[:, :, :count].set(points),
            none.labels.at[:, :, :count].set(labels),
            jnp.int32(count),
        )

    def click():
        points, labels = tracking.click(key, visit.truth, None, visit.frame, jnp.int32(0))
        return put(points[:, :, None], labels[:, :, None], 1)

    def box():
        return put(*tracking.box(key, visit.truth, visit.frame), 2)

    given = visit.is_cond & ~visit.from_mask
    return jax.lax.switch(jnp.where(given, 1 + visit.is_box, 0), [lambda: none, click, box])


def dense_prompt(tracking: Tracking, visit: Visit) -> Float[Array, "b o h w c"]:
    """The dense embedding of the given mask (it is read for the object pointer), or of none."""
    b, o, h, w = visit.truth.shape
    side = visit.features.top.shape[1:3]

    def given():
        mask = visit.truth.reshape(b * o, h, w).astype(visit.features.top.dtype)
        return tracking.call("mask_prompt", tracking.call("downsample_mask", mask))

    def none():
        embed = tracking.call("no_mask_prompt")
        return jnp.broadcast_to(embed, (b * o, *side, embed.shape[0]))

    dense = jax.lax.cond(visit.from_mask, given, none)
    return dense.reshape(b, o, *dense.shape[1:])


def predict(
    tracking: Tracking,
    visit: Visit,
    top: Float[Array, "b o h w c"],
    prompt: Prompt,
    dense: Float[Array, "b o h w c"],
    is_multi: Bool[Array, ""],
) -> Prediction:
    """One decoder pass, choosing the mask of the highest predicted IoU where there are three."""
    b, o, slots = prompt.labels.shape
    is_multi = is_multi & ~visit.from_mask
    # The reference appends a padding point, and stands another in for no points at all
    points = jnp.pad(prompt.points, ((0, 0), (0, 0), (1, 0), (0, 0)))
    labels = jnp.pad(prompt.labels, ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    used = jnp.arange(slots + 1) < 1 + jnp.maximum(prompt.count, 1)

    def rows(x):
        return x.reshape(b * o, *x.shape[2:])

    decoded = tracking.call(
        "decode",
        rows(top),
        visit.features.s1,
        visit.features.s0,
        rows(points),
        rows(labels),
        used,
        rows(dense),
    )
    decoded = jax.tree.map(lambda x: x.reshape(b, o, *x.shape[1:]), decoded)
    present = decoded.object_score > 0
    # The reference's hard choice: an object predicted absent has no mask, and no gradient to it
    masks = jnp.where(present[..., None, None, None], decoded.masks, NO_OBJECT)
    best = jnp.where(is_multi, 1 + decoded.ious[..., 1:].argmax(-1), 0)

    def chosen(x):
        index = best.reshape(*best.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, 2)[:, :, 0]

    return Prediction(
        masks=jnp.where(is_multi, masks[:, :, 1:], masks[:, :, :3]),
        ious=jnp.where(is_multi, decoded.ious[..., 1:], decoded.ious[..., :3]),
        is_multi=is_multi,
        mask=chosen(masks),
        token=chosen(decoded.tokens),
        object_score=decoded.object_score,
    )


def correct(
    tracking: Tracking,
    visit: Visit,
    top: Float[Array, "b o h w c"],
    prompt: Prompt,
    first: Prediction,
    key: PRNGKeyArray,
) -> tuple[Prediction, Prompt, Prediction]:
    """Correction clicks, each drawn from the error of the pass before and followed by another.

    Returns the last prediction, all points, and the later passes stacked.
    """
    skipped = jax.tree.map(lambda x: jnp.zeros((tracking.corrections, *x.shape), x.dtype), first)
    if not tracking.corrections:
        return first, prompt, skipped
    b, o, height, width = visit.truth.shape

    def once(carry, item):
        prompt, before = carry
        index, from_truth = item
        wrong_as = upsample(before.mask, (height, width)) > 0
        points, labels = tracking.click(
            jax.random.fold_in(key, index),
            visit.truth,
            wrong_as & ~from_truth,
            visit.frame,
            index + 1,
        )
        prompt = Prompt(
            prompt.points.at[:, :, prompt.count].set(points),
            prompt.labels.at[:, :, prompt.count].set(labels),
            prompt.count + 1,
        )
        logits = before.mask.reshape(b * o, *before.mask.shape[2:]).astype(top.dtype)
        dense = tracking.call("mask_prompt", logits).reshape(top.shape)
        after = predict(tracking, visit, top, prompt, dense, prompt.count < 2)
        return (prompt, after), after

    items = (jnp.arange(tracking.corrections), visit.from_truth)

    def clicks():
        (points, last), later = jax.lax.scan(once, (prompt, first), items)
        return last, points, later

    return jax.lax.cond(visit.is_corrected, clicks, lambda: (first, prompt, skipped))


def finish(
    tracking: Tracking,
    visit: Visit,
    first: Prediction,
    last: Prediction,
    prompt: Prompt,
    later: Prediction,
) -> FrameOut:
    """Pointer and memory of the final prediction, or of the given mask; outputs for the losses."""
    height, width = visit.truth.shape[2:]
    there = visit.truth.any((-2, -1))
    given = jnp.where(visit.truth, GIVEN, -GIVEN)
    # A given mask decides whether the object is there, over the decoder's own opinion
    score = jnp.where(visit.from_mask, jnp.where(there, GIVEN, -GIVEN), last.object_score)
    pointer = tracking.call("pointer", last.token, last.object_score > 0)
    pointer = tracking.call("gate_pointer", pointer, there | ~visit.from_mask)
    full = jnp.where(visit.from_mask, given, upsample(last.mask, (height, width)))
    encoded = tracking.call("encode_memory", visit.features.top, full, score > 0)
    low = downsample(given, last.mask.shape[2:])
    passes = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, later)
    return FrameOut(
        multi_masks=passes.masks[:2],
        multi_ious=passes.ious[:2],
        is_multi=passes.is_multi[:2],
        single_masks=passes.masks[2:, :, :, 0],
        single_ious=passes.ious[2:, :, :, 0],
        object_scores=passes.object_score.at[0].set(
            jnp.where(visit.from_mask, score, first.object_score)
        ),
        from_mask=visit.from_mask,
        is_corrected=visit.is_corrected,
        mask=jnp.where(visit.from_mask, low, last.mask),
        pointer=pointer,
        memory=encoded,
        points=prompt.points,
        labels=prompt.labels,
    )


class Tracker(NamedTuple):
    """Tracking one frame at a time, for clips of any length; both functions are jitted."""

    first: Callable[..., tuple["Tracked", Float[Array, "o h w"]]]
    next: Callable[..., tuple["Tracked", Float[Array, "o h w"]]]


class Tracked(NamedTuple):
    """Where a tracker is in its clip."""

    bank: Bank
    frame: Int[Array, ""]  # the next one


def make_tracker(model: Sam2) -> Tracker:
    """Semi-supervised tracking: `first` is given masks, `next` finds them on the frames after.

    `first(params, image, masks, num_frames)` and `next(params, state, image)` return a state and
    low-resolution mask logits (o, h/4, w/4). Images are uint8 (h, w, 3) at the model's
    resolution, masks boolean (o, h, w); `num_frames` is the length of the clip.
    """
    unbounded = memory.POINTER_WINDOW + 2  # longer than any window: nothing is sized by the clip

    def visit(params, state: Tracked, image, masks, from_mask):
        tracking = Tracking(model, params, unbounded, 0, True, uniform_click, noisy_box)
        key = jax.random.key(0)  # nothing is drawn
        features = jax.tree.map(lambda x: x[0], encode_frames(tracking, image[None, None], key))
        no, yes = jnp.zeros((), bool), jnp.asarray(from_mask)
        item = Visit(state.frame, features, masks[None], yes, yes, no, no, jnp.zeros(0, bool))
        bank, out = visit_frame(tracking, state.bank, item, key)
        return Tracked(bank, state.frame + 1), out.mask[0]

    def first(params, image, masks, num_frames):
        tracking = Tracking(model, params, unbounded, 0, True, uniform_click, noisy_box)
        side = model.resolution // 16
        top_shape = (1, side, side, model.variant.hidden_dim)
        bank = empty_bank(tracking, top_shape, masks.shape[0], 1)
        distance = jnp.minimum(num_frames, memory.POINTER_WINDOW + 1) - 1
        bank = bank._replace(max_distance=distance.astype(jnp.int32))
        return visit(params, Tracked(bank, jnp.int32(0)), image, masks, True)

    def following(params, state, image):
        objects = state.bank.memory.values.shape[1]
        nothing = jnp.zeros((objects, model.resolution, model.resolution), bool)
        return visit(params, state, image, nothing, False)

    return Tracker(jax.jit(first), jax.jit(following, donate_argnums=1))
