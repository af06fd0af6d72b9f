"""Brightness, contrast, saturation and grey as Pillow computes them, each one pass over a frame.

All of them blend the image with something plainer: black, its mean grey, its own grey version; the
fractions of the blend are cut off, what lies beyond 0-255 is clipped (`ImageEnhance`, which
torchvision's ColorJitter calls on the reference's frames). Each is an affine map of a pixel's
colour, which OpenCV applies in a twentieth of Pillow's time. Several could be one pass where
nothing is clipped on the way, which would save less than a tenth of a clip's time; but then one
value in fifty, not one in three hundred, would be more than two levels from Pillow's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

Kind = Literal["brightness", "contrast", "saturation"]
KINDS: tuple[Kind, ...] = ("brightness", "contrast", "saturation")
LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B in grey: ITU-R 601, as Pillow's mode "L"
CUT = 0.499  # OpenCV rounds; a little less than a half, so that whole results stay as they are
SAMPLE = 256  # rows and columns, about, that the mean grey is taken of


class Op(NamedTuple):
    """A blend: `factor` 1 leaves the image alone, 0 is all plain, above 1 exaggerates."""

    kind: Kind
    factor: float


GREY = Op("saturation", 0.0)


def draw_jitter(rng: np.random.Generator, strengths: Sequence[float]) -> list[Op]:
    """One draw of torchvision's ColorJitter: three factors, in a random order.

    Args:
        rng: the only randomness.
        strengths: b of brightness, contrast and saturation; factors are uniform in
            max(0, 1 - b) to 1 + b.
    """
    factors = [rng.uniform(max(0.0, 1 - b), 1 + b) for b in strengths]
    return [Op(KINDS[k], factors[k]) for k in rng.permutation(len(KINDS))]


def adjust(image: UInt8[np.ndarray, "h w 3"], ops: Sequence[Op]) -> None:
    """Apply blends one after the other, in place.

    A single one is within one level of Pillow. After both jitters of the recipe, six cuts of
    fractions, 99 of 100 values still are within two levels, and none is further off than six.
    """
    grey = False
    for op in ops:
        if op.factor == 1 or (grey and op.kind == "saturation"):
            continue
        cv2.transform(image, _blend(op, image), dst=image)
        grey |= op == GREY


def _blend(op: Op, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "3 4"]:
    """New R, G, B from R, G, B and 1."""
    kind, factor = op
    offset, mix = -CUT, factor * np.eye(3)
    if kind == "contrast":
        offset += (1 - factor) * _mean_grey(image)
    elif kind == "saturation":
        mix = mix + (1 - factor) * LUMA
        offset = 0.0 if op == GREY else offset  # Pillow's grey itself is rounded
    return np.column_stack([mix, np.full(3, offset)])


def _mean_grey(image: UInt8[np.ndarray, "h w 3"]) -> int:
    """Mean grey level, rounded.

    Of every k-th row and column only: what contrast does with it, a few per cent of its error,
    does not need more. k is odd, since fine patterns of pixels (a screen's) tend to be even.
    """
    step = min(image.shape[:2]) // SAMPLE | 1
    size = max(1, image.shape[1] // step), max(1, image.shape[0] // step)
    sample = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
    return int(cv2.mean(cv2.cvtColor(sample, cv2.COLOR_RGB2GRAY))[0] + 0.5)
