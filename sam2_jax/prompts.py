"""Prompts for training: the plan of a step, clicks and boxes from ground truth.

Source: facebookresearch/sam2@2b90b9f training/model/sam2.py (prepare_prompt_inputs) and
sam2_utils.py (sample_box_points, get_next_point). All functions are pure; the plan is one draw
for the whole batch, coordinates are drawn per object.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from sam2_jax.types import Array, PromptPlan

# (key, truth, prediction, frame, step) -> points (x, y) in pixels and labels; `prediction` is
# None where only the truth counts. Step 0 is the first prompt, 1.. the corrections.
PointSampler = Callable[..., tuple[Float[Array, "b o 2"], Int[Array, "b o"]]]
# (key, truth, frame) -> corners (top left, bottom right) and labels
BoxSampler = Callable[..., tuple[Float[Array, "b o 2 2"], Int[Array, "b o 2"]]]

BOX_NOISE = 0.1  # of the box's side
BOX_NOISE_LIMIT = 20.0  # pixels


class PromptSettings(NamedTuple):
    """Probabilities and limits of the plan; the defaults are the reference's for training."""

    prob_points: float = 0.5  # clicks or boxes instead of masks
    prob_box: float = 0.5  # a box instead of a click, given points
    prob_from_truth: float = 0.1  # a correction click ignores the prediction
    max_cond_frames: int = 2
    max_corrected_frames: int = 2
    corrections: int = 7  # clicks per corrected frame


def sample_plan(key: PRNGKeyArray, num_frames: int, settings: PromptSettings) -> PromptPlan:
    """Draw the plan of one step. Single images (num_frames 1) always get points on that frame."""
    kind, conds, corrected, frames, extra, boxes, truth = jax.random.split(key, 7)
    t = num_frames
    prob_points = 1.0 if t == 1 else settings.prob_points
    use_points = jax.random.uniform(kind) < prob_points
    most_cond = min(settings.max_cond_frames, t)
    num_cond = jax.random.randint(conds, (), 1, most_cond + 1)
    most_corrected = jnp.maximum(min(settings.max_corrected_frames, t), num_cond)
    num_corrected = jax.random.randint(corrected, (), num_cond, most_corrected + 1)

    # Frame 0 always, the others without replacement: the smallest of random ranks
    rank = jax.random.uniform(frames, (t,)).at[0].set(-1.0)
    is_cond = jnp.argsort(jnp.argsort(rank)) < num_cond
    more = jnp.where(is_cond, 2.0, jax.random.uniform(extra, (t,)))
    is_extra = jnp.argsort(jnp.argsort(more)) < num_corrected - num_cond
    return PromptPlan(
        # Conditioning frames first (frame 0, then the others), the rest in order
        order=jnp.argsort(jnp.where(is_cond, jnp.arange(t) - t, jnp.arange(t))).astype(jnp.int32),
        use_points=use_points,
        is_cond=is_cond,
        is_box=is_cond & use_points & (jax.random.uniform(boxes, (t,)) < settings.prob_box),
        is_corrected=use_points & (is_cond | is_extra),
        from_truth=jax.random.uniform(truth, (t, settings.corrections)) < settings.prob_from_truth,
    )


def taught_passes(plan: PromptPlan) -> Int[Array, ""]:
    """Decoder passes whose masks the loss teaches, of all frames: to compare losses of plans by.

    A frame has one, none where its mask was given, and one more for each correction click.
    """
    given = plan.is_cond & ~plan.use_points
    clicks = plan.from_truth.shape[1] * plan.is_corrected.sum()
    return (~given).sum() + clicks


def mask_plan(num_frames: int) -> PromptPlan:
    """Semi-supervised tracking: the mask of frame 0 and nothing else."""
    t = jnp.arange(num_frames, dtype=jnp.int32)
    never = jnp.zeros(num_frames, bool)
    return PromptPlan(
        t, jnp.zeros((), bool), t == 0, never, never, jnp.zeros((num_frames, 0), bool)
    )


def uniform_click(
    key: PRNGKeyArray,
    truth: Bool[Array, "b o h w"],
    prediction: Bool[Array, "b o h w"] | None = None,
    frame: Int[Array, ""] | None = None,
    step: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b o 2"], Int[Array, "b o"]]:
    """A pixel drawn uniformly from the wrong ones: label 1 where the object was missed, else 0.

    Where nothing is wrong, a pixel of the background with label 0 (of a full frame: (0, 0)).
    The reference takes the largest of one random number per pixel; here a row is drawn by its
    count and a column within it, which is the same distribution for two small cumulative sums.
    """
    wrong = truth if prediction is None else truth ^ prediction
    wrong = jnp.where(wrong.any((-2, -1), keepdims=True), wrong, ~truth)
    rows = wrong.sum(-1, dtype=jnp.int32).cumsum(-1)
    total = rows[..., -1]
    # uniform * total may round up to total in float32
    pick = jnp.floor(jax.random.uniform(key, total.shape) * total).astype(jnp.int32)
    pick = jnp.minimum(pick, jnp.maximum(total - 1, 0))
    y = (rows <= pick[..., None]).sum(-1)
    y = jnp.minimum(y, wrong.shape[-2] - 1)
    before = jnp.take_along_axis(rows, jnp.maximum(y - 1, 0)[..., None], -1)[..., 0]
    rest = pick - jnp.where(y > 0, before, 0)
    row = jnp.take_along_axis(wrong, y[..., None, None], -2)[..., 0, :]
    x = (row.cumsum(-1, dtype=jnp.int32) <= rest[..., None]).sum(-1)
    empty = total == 0
    x, y = jnp.where(empty, 0, x), jnp.where(empty, 0, y)
    label = jnp.take_along_axis(
        jnp.take_along_axis(truth, y[..., None, None], -2)[..., 0, :], x[..., None], -1
    )[..., 0]
    label = label & ~empty
    return jnp.stack([x, y], -1).astype(jnp.float32), label.astype(jnp.int32)


def centre_click(
    key: PRNGKeyArray,
    truth: Bool[Array, "b o h w"],
    prediction: Bool[Array, "b o h w"] | None = None,
    frame: Int[Array, ""] | None = None,
    step: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b o 2"], Int[Array, "b o"]]:
    """The innermost pixel of the wrong region, missed or false, that is the thicker of the two.

    Runs on the host (OpenCV's exact distance transform): for evaluation, not for training.
    """
    if prediction is None:
        prediction = jnp.zeros_like(truth)
    shapes = (
        jax.ShapeDtypeStruct((*truth.shape[:2], 2), jnp.float32),
        jax.ShapeDtypeStruct(truth.shape[:2], jnp.int32),
    )
    return jax.pure_callback(_centres, shapes, truth, prediction)


def _centres(truth, prediction) -> tuple[np.ndarray, np.ndarray]:
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    points = np.zeros((*truth.shape[:2], 2), np.float32)
    labels = np.zeros(truth.shape[:2], np.int32)
    for at in np.ndindex(*truth.shape[:2]):
        missed = _depth(truth[at] & ~prediction[at])
        false = _depth(~truth[at] & prediction[at])
        labels[at] = missed.max() > false.max()
        y, x = np.unravel_index((missed if labels[at] else false).argmax(), missed.shape)
        points[at] = x, y
    return points, labels


def _depth(region: np.ndarray) -> np.ndarray:
    """Distance in pixels to the outside of `region`; beyond the image is outside."""
    padded = np.pad(region, 1).astype(np.uint8)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def noisy_box(
    key: PRNGKeyArray, truth: Bool[Array, "b o h w"], frame: Int[Array, ""] | None = None
) -> tuple[Float[Array, "b o 2 2"], Int[Array, "b o 2"]]:
    """Corners of the bounding box, each side moved by up to a tenth of its length (20 pixels).

    Labels 2 and 3. An object that is not there gets no prompt (labels -1): the reference gives
    it the box [w, h, -1, -1], a positive prompt for nothing (its issue 470).
    """
    h, w = truth.shape[-2:]
    truth = jnp.asarray(truth)
    rows, cols = truth.any(-1), truth.any(-2)
    top, bottom = rows.argmax(-1), h - 1 - rows[..., ::-1].argmax(-1)
    left, right = cols.argmax(-1), w - 1 - cols[..., ::-1].argmax(-1)
    box = jnp.stack([left, top, right, bottom], -1).astype(jnp.float32)
    side = jnp.stack([right - left, bottom - top] * 2, -1).astype(jnp.float32)
    reach = jnp.minimum(side * BOX_NOISE, BOX_NOISE_LIMIT)
    box = box + jax.random.uniform(key, box.shape, minval=-1.0, maxval=1.0) * reach
    box = jnp.clip(box, 0.0, jnp.array([w - 1, h - 1] * 2, jnp.float32))
    labels = jnp.where(rows.any(-1)[..., None], jnp.array([2, 3]), -1)
    return box.reshape(*box.shape[:2], 2, 2), labels.astype(jnp.int32)
