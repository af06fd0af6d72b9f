"""What happens on one frame: its prompt, the decoder passes, the correction clicks.

Source: facebookresearch/sam2@2b90b9f sam2_base.py (_forward_sam_heads) and
training/model/sam2.py (prepare_prompt_inputs, _iter_correct_pt_sampling).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from sam2_jax.model.sam2 import Sam2
from sam2_jax.prompts import BoxSampler, PointSampler
from sam2_jax.resize import resize
from sam2_jax.types import Array, Decoded, Features

DELTA, STABLE = 0.05, 0.98  # of a mask's stability
NO_OBJECT = -1024.0  # mask logit of an object that is predicted absent


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
    remembered: Bool[Array, ""]  # whether a later frame will read its memory


class Inference(NamedTuple):
    """What inference does otherwise than training. The default is training.

    Source: facebookresearch/sam2@2b90b9f sam2_video_predictor.py, build_sam.py.
    """

    from_low: bool = False  # a prompted frame's memory is of its low-resolution mask
    memory_dtype: Any = None  # in which memories are kept; None: that of the computation
    stability: bool = False  # unstable single masks give way to the best of three
    binarise: bool = False  # a prompted frame's memory is of its mask, not of its logits


class Tracking(NamedTuple):
    """What stays the same over all visits: the model, its parameters and how to sample."""

    model: Sam2
    params: dict
    num_frames: int
    corrections: int
    deterministic: bool
    click: PointSampler
    box: BoxSampler
    points: bool  # whether plans may give points at all
    inference: Inference = Inference()

    def call(self, method: str, *args, rngs: dict | None = None, **kwargs) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method, rngs=rngs, **kwargs)


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


def first_prompt(tracking: Tracking, visit: Visit, key: PRNGKeyArray) -> Prompt:
    """A click or a box where the plan gives one, else no points."""
    b, o = visit.truth.shape[:2]
    slots = 2 + tracking.corrections if tracking.points else 1
    none = Prompt(jnp.zeros((b, o, slots, 2)), jnp.full((b, o, slots), -1, jnp.int32), jnp.int32(0))
    if not tracking.points:
        return none

    def put(points, labels, count: int):
        return Prompt(
            jnp.asarray(none.points).at[:, :, :count].set(points),
            jnp.asarray(none.labels).at[:, :, :count].set(labels),
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
        dense = tracking.call("mask_prompt", tracking.call("downsample_mask", mask))
        return dense.astype(visit.features.top.dtype)

    def none():
        embed = tracking.call("no_mask_prompt")
        embed = embed.astype(visit.features.top.dtype)
        return jnp.broadcast_to(embed, (b * o, *side, embed.shape[0]))

    dense = jax.lax.cond(visit.from_mask, given, none)
    return dense.reshape(b, o, *dense.shape[1:])


def prefer_stable(decoded: Decoded) -> Decoded:
    """Replaces a single mask (and its IoU) that is unstable by the best of the other three.

    Stable means that the areas above +0.05 and above -0.05 differ by at most 2 %. The mask token,
    of which the object pointer is made, stays. Source: sam/mask_decoder.py
    (_dynamic_multimask_via_stability), which the reference offers for inference.
    """
    low, high = ((decoded.masks[:, 0] > edge).sum((-2, -1)) for edge in (-DELTA, DELTA))
    stable = high >= STABLE * low  # also where both are empty
    best = decoded.ious[:, 1:].argmax(-1)
    use = jnp.where(stable, 0, 1 + best)
    mask = jnp.take_along_axis(decoded.masks, use[:, None, None, None], 1)
    iou = jnp.take_along_axis(decoded.ious, use[:, None], 1)
    return decoded._replace(
        masks=jnp.concatenate([mask, decoded.masks[:, 1:]], 1),
        ious=jnp.concatenate([iou, decoded.ious[:, 1:]], 1),
    )


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
    if tracking.inference.stability:
        decoded = prefer_stable(decoded)
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
        wrong_as = resize(before.mask, (height, width)) > 0
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
        # Recomputed in the backward pass: kept, the insides of every click would be allocated and
        # cleared on all frames, for the few that are corrected
        (points, last), later = jax.lax.scan(jax.checkpoint(once), (prompt, first), items)
        return last, points, later

    return jax.lax.cond(visit.is_corrected, clicks, lambda: (first, prompt, skipped))
