"""Tracking objects through a clip: the memory loop over frames as one `lax.scan`.

Source: SAM 2 (arXiv 2408.00714), facebookresearch/sam2@2b90b9f training/model/sam2.py
(forward_tracking, track_step) and sam2_base.py (_use_mask_as_output).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray, UInt8

from sam2_jax import memory
from sam2_jax.decode import (
    Prediction,
    Prompt,
    Tracking,
    Visit,
    correct,
    dense_prompt,
    first_prompt,
    predict,
)
from sam2_jax.encode import STRIDE, Shared, compute_dtype, encode_frames
from sam2_jax.model.sam2 import Sam2
from sam2_jax.prompts import BoxSampler, PointSampler, noisy_box, uniform_click
from sam2_jax.resize import resize
from sam2_jax.types import Array, Bank, Batch, FrameOut, PromptPlan

GIVEN = 10.0  # logits of a mask that was given: +-10
CERTAIN = 200.0  # a logit whose sigmoid is 0 or 1 in float32


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
    points: bool = True,
    last_memory: bool = False,
    shared_by: Shared | None = None,
) -> FrameOut:
    """Segment every object on every frame of a batch of clips, prompted as the plan says.

    Args:
      batch: uint8 images at the model's resolution, ground truth (read for prompts).
      plan: from `prompts.sample_plan`; its `from_truth` says how many correction clicks.
      key: for dropout and the coordinates of prompts.
      max_cond: the most frames that may become conditioning frames.
      click, box: samplers, replaceable (`prompts.centre_click` for evaluation).
      remat: what the backward pass computes again: "none"; "frame": each visit; "full": also
        the image encoder, one frame at a time.
      points: False where the plan never gives points; their programs are then left out.
      last_memory: also make the memory of the frame visited last, which no other will read.
      shared_by: inside `jax.shard_map`, the devices that share these videos. All have the images,
        each the masks of its own objects, and returns those objects' outputs.

    Returns outputs with a leading axis of frames, in frame order.
    """
    tracking = make_tracking(
        model, params, batch, plan, deterministic=deterministic, click=click, box=box, points=points
    )
    keys, visits, bank = begin(tracking, batch, plan, key, max_cond, last_memory, shared_by)
    images = batch.images.swapaxes(0, 1)[plan.order]
    _, outs = follow(tracking, bank, images, visits, keys, remat, shared_by)
    return jax.tree.map(lambda x: x[jnp.argsort(plan.order)], outs)


def make_tracking(
    model: Sam2,
    params: dict,
    batch: Batch,
    plan: PromptPlan,
    *,
    deterministic: bool = False,
    click: PointSampler = uniform_click,
    box: BoxSampler = noisy_box,
    points: bool = True,
) -> Tracking:
    """What stays the same over all visits of a training clip; arguments as of `track`."""
    return Tracking(
        model,
        params,
        num_frames=batch.images.shape[1],
        corrections=plan.from_truth.shape[1],
        deterministic=deterministic,
        click=click,
        box=box,
        points=points,
    )


def begin(
    tracking: Tracking,
    batch: Batch,
    plan: PromptPlan,
    key: PRNGKeyArray,
    max_cond: int,
    last_memory: bool = False,
    shared_by: Shared | None = None,
) -> tuple[tuple[PRNGKeyArray, PRNGKeyArray], Visit, Bank]:
    """(keys of visits and of images, what is asked of each visit, in order, an empty bank).

    The visits have no features yet: `follow` makes them.
    """
    key, encoder_key = jax.random.split(key)
    if shared_by:  # other objects, other draws
        key = jax.random.fold_in(key, jax.lax.axis_index(shared_by.axis))
    t = tracking.num_frames
    nothing_yet: Any = ()
    by_frame = Visit(
        frame=jnp.arange(t, dtype=jnp.int32),
        features=nothing_yet,
        truth=batch.masks.swapaxes(0, 1),
        from_mask=plan.is_cond & ~plan.use_points,
        is_cond=plan.is_cond,
        is_box=plan.is_box,
        is_corrected=plan.is_corrected,
        from_truth=plan.from_truth,
        remembered=jnp.full(t, last_memory) | (jnp.arange(t) != plan.order[-1]),
    )
    b, side = len(batch.images), batch.images.shape[2] // STRIDE
    top_shape = (b, side, side, tracking.model.variant.hidden_dim)
    bank = empty_bank(tracking, top_shape, batch.masks.shape[2], max_cond)
    return (key, encoder_key), jax.tree.map(lambda x: x[plan.order], by_frame), bank


def follow(
    tracking: Tracking,
    bank: Bank,
    images: UInt8[Array, "t b h w 3"],
    visits: Visit,
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
    remat: str = "none",
    shared_by: Shared | None = None,
) -> tuple[Bank, FrameOut]:
    """Visit frames, all of a clip or a part of it; `images` and outputs are in that order."""
    key, encoder_key = keys
    features = encode_frames(
        tracking, images, visits.frame, encoder_key, remat == "full", shared_by
    )

    def body(bank, visit):
        return visit_frame(tracking, bank, visit, jax.random.fold_in(key, visit.frame))

    body = body if remat == "none" else jax.checkpoint(body)
    return jax.lax.scan(body, bank, visits._replace(features=features))


def visit_frame(
    tracking: Tracking, bank: Bank, visit: Visit, key: PRNGKeyArray, given: Prompt | None = None
) -> tuple[Bank, FrameOut]:
    """Visit one frame: look at what is remembered, predict, correct, remember.

    `given` are points to take instead of sampled ones.
    """
    memory_key, prompt_key, click_key = jax.random.split(key, 3)
    top = condition(tracking, bank, visit, memory_key)
    prompt = first_prompt(tracking, visit, prompt_key) if given is None else given
    first = predict(tracking, visit, top, prompt, dense_prompt(tracking, visit), prompt.count < 2)
    last, prompt, later = correct(tracking, visit, top, prompt, first, click_key)
    out = finish(tracking, visit, first, last, prompt, later)
    is_cond = visit.is_cond | visit.is_corrected
    return memory.write(bank, visit.frame, is_cond, out.memory, out.pointer), out


def empty_bank(tracking: Tracking, top_shape: tuple[int, ...], objects: int, max_cond: int) -> Bank:
    """An empty bank for features of shape (videos, height, width, channels)."""
    b, h, w, c = top_shape
    shape = (b, objects, h * w, tracking.model.variant.memory_dim)
    dtype = compute_dtype(tracking.params)
    kept = tracking.inference.memory_dtype or dtype
    return memory.empty(shape, c, tracking.num_frames, max_cond, kept, dtype)


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

    def remembering():
        context = memory.read(bank, visit.frame, tracking.num_frames)
        context = context._replace(memory=context.memory.astype(compute_dtype(tracking.params)))
        return tracking.call(
            "with_memory",
            top,
            *context,
            deterministic=tracking.deterministic,
            rngs={"dropout": key},
        )

    if tracking.num_frames == 1:
        return alone()
    return jax.lax.cond(visit.is_cond, alone, remembering)


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
    low = jnp.where(visit.from_mask, resize(given, last.mask.shape[2:]), last.mask)
    full = resize(low, (height, width))
    if not tracking.inference.from_low:
        full = jnp.where(visit.from_mask, given, full)
    if tracking.inference.binarise:
        full = jnp.where(visit.is_cond, jnp.where(full > 0, CERTAIN, -CERTAIN), full)
    remember = partial(tracking.call, "encode_memory", visit.features.top, full, score > 0)
    nothing = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(remember))
    encoded = jax.lax.cond(visit.remembered, remember, nothing)
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
        mask=low,
        pointer=pointer,
        memory=encoded,
        points=prompt.points,
        labels=prompt.labels,
    )
