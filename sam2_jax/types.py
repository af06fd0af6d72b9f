"""Containers that travel along the road of data, and the legend of array axes.

Axis letters, in every jaxtyping annotation of the package:

    t frames    b videos    o objects    p points of a prompt    h w pixels
    n tokens    c channels  m masks of one prediction    s decoder passes    k slots

Points are `(x, y)` in pixels of the model's input. Masks are boolean (ground truth) or logits
(predictions). "Low resolution" is a quarter of the input's side, where the decoder predicts.
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray
NAMED = 3  # so many of a list are spelt out in a message, the others are counted


class UserError(Exception):
    """Something the user can mend: scripts print it as one line `error: ...` and exit with 2."""


def fail(error: UserError) -> int:
    """Prints the one line and gives the exit status."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def listed(texts: Iterable[str]) -> str:
    """The first few, and how many more."""
    texts = list(texts)
    more = len(texts) - NAMED
    return "; ".join(texts[:NAMED]) + (f"; and {more} more" if more > 0 else "")


class Batch(NamedTuple):
    """What the loader yields and one training step consumes. The leading axis is sharded."""

    images: UInt8[Array, "b t h w 3"]  # RGB, 0-255, square
    masks: Bool[Array, "b t o h w"]  # ground truth of every object on every frame
    valid: Bool[Array, "b o"]  # False where the object is only padding


class PromptPlan(NamedTuple):
    """Which prompts a step gives: one draw for the whole batch, so that branches stay branches.

    All but `order` are indexed by frame, not by visit.
    """

    order: Int[Array, " t"]  # frames in the order they are visited: conditioning first
    use_points: Bool[Array, ""]  # clicks and boxes (True) or ground-truth masks (False)
    is_cond: Bool[Array, " t"]  # initial conditioning frame: prompted, sees no memory
    is_box: Bool[Array, " t"]  # its prompt is a box instead of a click
    is_corrected: Bool[Array, " t"]  # receives correction clicks
    from_truth: Bool[Array, "t s"]  # this correction click is drawn from the ground truth


class Features(NamedTuple):
    """Image features of n images: the neck's three levels."""

    top: Float[Array, "n h w c"]  # stride 16
    s1: Float[Array, "n h1 w1 c1"]  # stride 8, projected for the mask decoder
    s0: Float[Array, "n h0 w0 c0"]  # stride 4, projected for the mask decoder


class Decoded(NamedTuple):
    """One pass of prompt encoder and mask decoder, all four mask tokens."""

    masks: Float[Array, "n 4 h w"]  # low-resolution logits; 0 is the single-mask token
    ious: Float[Array, "n 4"]  # predicted IoU, 0-1
    tokens: Float[Array, "n 4 c"]  # mask tokens after the transformer
    object_score: Float[Array, " n"]  # logit: is the object on this frame at all


class FrameOut(NamedTuple):
    """Everything the losses read of one frame (after the scan: a leading axis t).

    A frame has one decoder pass, or 1 + corrections. The first two may be multimask (3 masks),
    the later ones are always single; entries of passes that did not happen are zeros.
    """

    multi_masks: Float[Array, "*t p b o 3 h w"]  # low-resolution logits of the first two passes
    multi_ious: Float[Array, "*t p b o 3"]
    is_multi: Bool[Array, "*t p"]  # False: only mask 0 of the 3 was predicted
    single_masks: Float[Array, "*t s b o h w"]  # low-resolution logits of the other passes
    single_ious: Float[Array, "*t s b o"]
    object_scores: Float[Array, "*t passes b o"]  # logits
    from_mask: Bool[Array, "*t"]  # the prompt was the ground-truth mask and is the output
    is_corrected: Bool[Array, "*t"]  # the later passes happened
    mask: Float[Array, "*t b o h w"]  # final low-resolution logits
    pointer: Float[Array, "*t b o c"]  # object pointer
    memory: Float[Array, "*t b o n d"]  # encoded memory; zeros where nobody reads it
    points: Float[Array, "*t b o q 2"]  # prompt points, for pictures and tests
    labels: Int[Array, "*t b o q"]  # 1 object, 0 not, 2 3 box corners, -1 none


class Slots(NamedTuple):
    """A growing set of entries; the first `count` are in use, in no particular order."""

    values: Float[Array, "b o k *rest"]
    frame: Int[Array, " k"]  # which frame each entry is of
    is_cond: Bool[Array, " k"]  # conditioning frames are kept for ever
    count: Int[Array, ""]


class Bank(NamedTuple):
    """What is remembered of the frames visited so far."""

    memory: Slots  # b o k n d: encoded frames
    pointers: Slots  # b o k c: object pointers
    max_distance: Int[Array, ""]  # pointers' temporal code divides by this
