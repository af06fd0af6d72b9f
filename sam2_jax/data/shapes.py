"""Random outlines that deform with time, as closed curves of complex numbers of radius about 1.

Complex numbers make moving a shape one line: `centre + scale * exp(1j * angle) * outline`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

POINTS = 48  # corners of a drawn curve: the chord error is 0.2 % of the radius
THETA = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
UNIT = np.exp(1j * THETA)

Part = list[np.ndarray]  # complex [n] curves, filled by the even-odd rule: a second one is a hole
Outline = Callable[[float], list[Part]]  # phase of the deformation (radians) -> parts


def _squeeze(curve: np.ndarray, aspect: float) -> np.ndarray:
    return np.real(curve) + 1j * aspect * np.imag(curve)


class Harmonics(NamedTuple):
    """A star-shaped curve `1 + sum a_k cos(k theta + p_k)`, squeezed by `aspect`, that sways."""

    orders: np.ndarray
    sizes: np.ndarray
    phases: np.ndarray
    sway: np.ndarray  # how fast each harmonic turns with the phase of deformation
    aspect: float
    hole: float  # radius of a hole, 0 for none

    def __call__(self, phase: float) -> list[Part]:
        """Outer curve and perhaps its hole at one phase."""
        turn = self.phases + 0.7 * np.sin(self.sway * phase)
        radius = 1 + self.sizes @ np.cos(self.orders[:, None] * THETA + turn[:, None])
        curve = radius * UNIT
        curve = _squeeze(curve, self.aspect)
        return [[curve, self.hole * curve]] if self.hole else [[curve]]


class Corners(NamedTuple):
    """A polygon whose corners breathe."""

    corners: np.ndarray  # complex
    phases: np.ndarray

    def __call__(self, phase: float) -> list[Part]:
        """The polygon at one phase."""
        return [[self.corners * (1 + 0.12 * np.sin(phase + self.phases))]]


class Creature(NamedTuple):
    """A body with limbs that swing about where they join it."""

    aspect: float
    angles: np.ndarray  # of the limbs, radians
    lengths: np.ndarray
    widths: np.ndarray
    phases: np.ndarray

    def __call__(self, phase: float) -> list[Part]:
        """Body and limbs at one phase, one part each: their union is the object."""
        parts: list[Part] = [[0.78 * _squeeze(UNIT, self.aspect)]]
        swing = 0.5 * np.sin(phase + self.phases)
        for angle, length, width, turn in zip(
            self.angles, self.lengths, self.widths, swing, strict=True
        ):
            limb = length * (0.85 + _squeeze(UNIT, width / length))
            joint = 0.55 * (np.cos(angle) + 1j * self.aspect * np.sin(angle))
            parts.append([joint + np.exp(1j * (angle + turn)) * limb])
        return parts


def random_outline(rng: np.random.Generator) -> Outline:
    """Draw one of: ellipse, blob, star, polygon, ring, creature."""
    kind = rng.choice(["ellipse", "blob", "star", "polygon", "ring", "creature"])
    if kind == "polygon":
        n = int(rng.integers(3, 8))
        angles = 2 * np.pi * (np.arange(n) + rng.uniform(-0.25, 0.25, n)) / n
        corners = rng.uniform(0.85, 1.25, n) * np.exp(1j * angles)
        return Corners(corners, rng.uniform(0, 2 * np.pi, n))
    if kind == "creature":
        n = int(rng.integers(1, 5))
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * (np.arange(n) + rng.normal(0, 0.1, n)) / n
        lengths, widths = rng.uniform(0.35, 0.6, n), rng.uniform(0.16, 0.3, n)
        return Creature(rng.uniform(0.6, 1), angles, lengths, widths, rng.uniform(0, 7, n))
    orders = np.arange(2, 6)
    sizes = rng.normal(0, 0.03, 4) if kind == "ellipse" else rng.normal(0, 0.3, 4) / orders
    if kind == "star":
        orders = np.append(orders, rng.integers(3, 8))
        sizes = np.append(sizes * 0.4, rng.uniform(0.18, 0.32))
    return Harmonics(
        orders=orders,
        sizes=sizes,
        phases=rng.uniform(0, 2 * np.pi, len(orders)),
        sway=rng.uniform(0.3, 1.2, len(orders)),
        aspect=rng.uniform(0.45, 0.75) if kind == "ellipse" else rng.uniform(0.75, 1.0),
        hole=rng.uniform(0.3, 0.48) if kind == "ring" else 0.0,
    )
