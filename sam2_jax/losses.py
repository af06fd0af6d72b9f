"""The losses of SAM 2, summed over objects, decoder passes and frames.

Source: facebookresearch/sam2@2b90b9f training/loss_fns.py (MultiStepMultiMasksAndIous).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from sam2_jax.resize import resize
from sam2_jax.types import Array, FrameOut

ALPHA, GAMMA = 0.25, 2.0  # focal loss, RetinaNet (arXiv 1708.02002)


class LossWeights(NamedTuple):
    """Weights of the terms in the total; the reference's."""

    mask: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    object_class: float = 1.0


class Terms(NamedTuple):
    """The four terms, unweighted."""

    mask: Float[Array, ""]
    dice: Float[Array, ""]
    iou: Float[Array, ""]
    object_class: Float[Array, ""]


REFERENCE_WEIGHTS = LossWeights()


def focal_loss(logits: Float[Array, "*n h w"], truth: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """Sigmoid focal loss, mean over pixels."""
    # p_t = sigmoid(signed): of the true class
    signed = jnp.where(truth, logits, -logits)
    alpha = jnp.where(truth, ALPHA, 1 - ALPHA)
    loss = alpha * jax.nn.sigmoid(-signed) ** GAMMA * jax.nn.softplus(-signed)
    return loss.mean((-2, -1))


def dice_loss(logits: Float[Array, "*n h w"], truth: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """1 - (2 |A B| + 1) / (|A| + |B| + 1) on probabilities."""
    prob = jax.nn.sigmoid(logits)
    both = jnp.where(truth, prob, 0.0).sum((-2, -1))
    total = prob.sum((-2, -1)) + truth.sum((-2, -1))
    return 1 - (2 * both + 1) / (total + 1)


def mask_iou(logits: Float[Array, "*n h w"], truth: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """Intersection over union of the thresholded mask; 0 where both are empty."""
    mask = logits > 0
    union = (mask | truth).sum((-2, -1))
    return (mask & truth).sum((-2, -1)) / jnp.maximum(union, 1).astype(jnp.float32)


def pass_terms(
    logits: Float[Array, "b o m h w"],
    ious: Float[Array, "b o m"],
    predicted: Bool[Array, " m"],
    object_score: Float[Array, "b o"],
    truth: Bool[Array, "b o y x"],
    valid: Bool[Array, "b o"],
    weights: LossWeights,
) -> Terms:
    """The four terms of one decoder pass, summed over real objects (not yet divided).

    Of m masks only those `predicted` count, and only the best (by mask and dice loss) is taught;
    every mask's IoU prediction is. Absent objects teach the object score alone.
    """
    size = (truth.shape[-2], truth.shape[-1])
    full = resize(logits, size)
    each = jnp.broadcast_to(truth[:, :, None], full.shape)
    mask, dice = focal_loss(full, each), dice_loss(full, each)
    combined = jnp.where(predicted, weights.mask * mask + weights.dice * dice, jnp.inf)
    best = jax.nn.one_hot(combined.argmin(-1), logits.shape[2], dtype=jnp.float32)
    iou = jnp.abs(ious - jax.lax.stop_gradient(mask_iou(full, each))) * predicted
    present = truth.any((-2, -1))
    score = jax.nn.softplus(jnp.where(present, -object_score, object_score))
    taught = present & valid
    return Terms(
        mask=((mask * best).sum(-1) * taught).sum(),
        dice=((dice * best).sum(-1) * taught).sum(),
        iou=(iou.sum(-1) / predicted.sum() * taught).sum(),
        object_class=(score * valid).sum(),
    )


def frame_terms(
    out: FrameOut,
    truth: Bool[Array, "b o h w"],
    valid: Bool[Array, "b o"],
    weights: LossWeights,
) -> Terms:
    """The terms of all passes that happened on one frame."""
    ever = jnp.ones(1, bool)
    first = jnp.array([True, False, False])

    def given():
        # The prompt was the true mask, and is the output at full resolution
        logits = jnp.where(truth, 10.0, -10.0)[:, :, None]
        ones = jnp.ones((*truth.shape[:2], 1))
        return pass_terms(logits, ones, ever, out.object_scores[0], truth, valid, weights)

    def multi(i: int):
        predicted = first | out.is_multi[i]
        masks, ious = out.multi_masks[i], out.multi_ious[i]
        return pass_terms(masks, ious, predicted, out.object_scores[i], truth, valid, weights)

    def corrections():
        def one(total, item):
            masks, ious, score = item
            terms = pass_terms(
                masks[:, :, None], ious[..., None], ever, score, truth, valid, weights
            )
            return jax.tree.map(jnp.add, total, terms), None

        items = (out.single_masks, out.single_ious, out.object_scores[2:])
        return jax.lax.scan(jax.checkpoint(one), multi(1), items)[0]

    terms = jax.lax.cond(out.from_mask, given, lambda: multi(0))
    if out.object_scores.shape[0] == 1:
        return terms
    zeros = jax.tree.map(jnp.zeros_like, terms)
    more = jax.lax.cond(out.is_corrected, corrections, lambda: zeros)
    return jax.tree.map(jnp.add, terms, more)


def total(
    out: FrameOut,
    masks: Bool[Array, "t b o h w"],
    valid: Bool[Array, "b o"],
    weights: LossWeights = REFERENCE_WEIGHTS,
    objects: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a batch and its unweighted terms, divided by the number of real objects.

    That number is `objects` where the batch is a part of a larger one, so that the losses of all
    parts add up to that of the whole; else it is counted here. Under `jit` the sums, the number
    among them, run over the global batch, so that a device with more objects counts for more.
    Logits are upsampled frame by frame and again in the backward pass, never kept at full
    resolution.
    """

    def one(sums, item):
        frame_out, truth = item
        terms = frame_terms(frame_out, truth, valid, weights)
        return jax.tree.map(jnp.add, sums, terms), None

    zero = Terms(*[jnp.zeros(())] * 4)
    sums, _ = jax.lax.scan(jax.checkpoint(one), zero, (out, masks))
    count = valid.sum() if objects is None else objects
    terms = jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums)
    loss = jnp.stack(terms) @ jnp.asarray(weights, jnp.float32)
    return loss, {
        "loss_mask": terms.mask,
        "loss_dice": terms.dice,
        "loss_iou": terms.iou,
        "loss_class": terms.object_class,
    }
