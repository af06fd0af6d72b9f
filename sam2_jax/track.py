"""Tracking objects through a clip: the memory loop over frames as one `lax.scan`.

Source: SAM 2 (arXiv 2408.00714), facebookresearch/sam2@2b90b9f training/model/sam2.py
(forward_tracking, track_step) and sam2_base.py (_use_mask_as_output).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

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
from sam2_jax.model.sam2 import Sam2, normalise
from sam2_jax.prompts import BoxSampler, PointSampler, noisy_box, uniform_click
from sam2_jax.resize import resize
from sam2_jax.types import Array, Bank, Batch, Features, FrameOut, PromptPlan

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

    Returns outputs with a leading axis of frames, in frame order.
    """
    b, t = batch.images.shape[:2]
    tracking = Tracking(
        model,
        params,
        num_frames=t,
        corrections=plan.from_truth.shape[1],
        deterministic=deterministic,
        click=click,
        box=box,
        exact=True,
        points=points,
    )
    key, encoder_key = jax.random.split(key)
    features = encode_frames(tracking, batch.images, encoder_key, one_by_one=remat == "full")
    by_frame = Visit(
        frame=jnp.arange(t, dtype=jnp.int32),
        features=features,
        truth=batch.masks.swapaxes(0, 1),
        from_mask=plan.is_cond & ~plan.use_points,
        is_cond=plan.is_cond,
        is_box=plan.is_box,
        is_corrected=plan.is_corrected,
        from_truth=plan.from_truth,
        remembered=jnp.full(t, last_memory) | (jnp.arange(t) != plan.order[-1]),
    )
    visits = jax.tree.map(lambda x: x[plan.order], by_frame)
    bank = empty_bank(tracking, features.top.shape[1:], batch.masks.shape[2], max_cond)

    def body(bank, visit):
        return visit_frame(tracking, bank, visit, jax.random.fold_in(key, visit.frame))

    _, outs = jax.lax.scan(body if remat == "none" else jax.checkpoint(body), bank, visits)
    return jax.tree.map(lambda x: x[jnp.argsort(plan.order)], outs)


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


def encode_frames(
    tracking: Tracking, images: Array, key: PRNGKeyArray, one_by_one: bool = False
) -> Features:
    """Features of all frames, leading axes (t, b).

    `one_by_one`: nothing is kept for the backward pass, which encodes each frame again when it
    comes to it: the insides of one frame at a time are in memory, not those of all.
    """

    def encode(images: Array, key: PRNGKeyArray) -> Features:
        pixels = normalise(images, compute_dtype(tracking.params))
        rngs = {"dropout": key}
        return tracking.call("encode_image", pixels, tracking.deterministic, rngs=rngs)

    frames = images.swapaxes(0, 1)
    keys = jax.random.split(key, len(frames))
    if one_by_one:
        return jax.lax.map(lambda item: jax.checkpoint(encode)(*item), (frames, keys))
    return jax.vmap(encode)(frames, keys)


def compute_dtype(params: dict):
    """The dtype of kernels, in which products are computed and memories kept."""
    return params["mask_downsample"]["kernel"].dtype


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

    def remembering(count: int):
        context = memory.read(bank, visit.frame, count, tracking.num_frames)
        context = context._replace(memory=context.memory.astype(compute_dtype(tracking.params)))
        return tracking.call(
            "with_memory",
            top,
            *context,
            deterministic=tracking.deterministic,
            rngs={"dropout": key},
        )

    most = min(tracking.num_frames - 1, bank.memory.frame.shape[0])
    counts = range(1, most + 1) if tracking.exact else [most]
    # Recomputed in the backward pass: else every visit would hold the insides of all branches
    branches = [alone] + [jax.checkpoint(partial(remembering, count)) for count in counts]
    branch = bank.memory.count if tracking.exact else 1
    return jax.lax.switch(jnp.where(visit.is_cond, 0, branch), branches)


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
