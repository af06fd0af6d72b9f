"""Procedural textures: a random scalar field coloured through a random ramp."""

import colorsys
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float, UInt8

Field = Float[np.ndarray, "h w"]


def noise(rng: np.random.Generator, side: int, cells: int, octaves: int) -> Field:
    """Value noise in 0-1: grids of `cells * 2^k` random values, smoothed and added up."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        n = min(cells << octave, side)
        grid = rng.random((n, n), np.float32)
        smooth = cv2.INTER_CUBIC if octave < 2 else cv2.INTER_LINEAR
        total += 0.55**octave * cv2.resize(grid, (side, side), interpolation=smooth)
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _axes(rng: np.random.Generator, side: int) -> tuple[Field, Field]:
    """Coordinates -1..1 in a randomly turned frame."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, side, dtype=np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return line * cos + line[:, None] * sin, line[:, None] * cos - line * sin


def _clouds(rng: np.random.Generator, side: int) -> Field:
    return noise(rng, side, int(rng.integers(3, 7)), 4)


def _stripes(rng: np.random.Generator, side: int) -> Field:
    x, _ = _axes(rng, side)
    bend = rng.uniform(0, 3) * noise(rng, side, 3, 1)
    wave = np.sin(rng.uniform(8, 20) * x + bend)
    return np.clip(0.5 + rng.uniform(0.6, 2.0) * wave, 0, 1, dtype=np.float32)


def _checks(rng: np.random.Generator, side: int) -> Field:
    x, y = _axes(rng, side)
    rate = rng.uniform(7, 15)
    return np.clip(0.5 + 3 * np.sin(rate * x) * np.sin(rate * y), 0, 1, dtype=np.float32)


def _gradient(rng: np.random.Generator, side: int) -> Field:
    x, _ = _axes(rng, side)
    return np.clip(0.5 + 0.5 * x + 0.35 * (noise(rng, side, 4, 3) - 0.5), 0, 1, dtype=np.float32)


def _spots(rng: np.random.Generator, side: int) -> Field:
    field = 0.3 * noise(rng, side, 4, 2)
    for _ in range(int(rng.integers(15, 40))):
        x, y = (int(v) for v in rng.integers(0, side << 4, 2))
        radius = int(rng.uniform(0.02, 0.09) * side * 16)
        cv2.circle(field, (x, y), radius, rng.uniform(0.7, 1.0), -1, cv2.LINE_8, 4)
    return cv2.blur(field, (3, 3))


FIELDS: tuple[Callable[[np.random.Generator, int], Field], ...] = (
    _clouds,
    _stripes,
    _checks,
    _gradient,
    _spots,
)


def ramp(colours: list[tuple[float, float, float]]) -> UInt8[np.ndarray, "256 3"]:
    """256 RGB colours that run through the given HSV ones (each 0-1)."""
    stops = np.array([colorsys.hsv_to_rgb(h % 1.0, s, v) for h, s, v in colours])
    at, knots = np.linspace(0, 1, 256), np.linspace(0, 1, len(colours))
    channels = [np.interp(at, knots, stops[:, c]) for c in range(3)]
    return (255 * np.stack(channels, -1)).round().astype(np.uint8)


def _paint(field: Field, colours: UInt8[np.ndarray, "256 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return colours[(255 * field).astype(np.uint8)]


def object_texture(rng: np.random.Generator, side: int, hue: float) -> UInt8[np.ndarray, "h w 3"]:
    """A vivid texture around one hue (0-1), with an accent colour."""
    field = FIELDS[rng.integers(len(FIELDS))](rng, side)
    field = np.clip(field + 0.22 * (noise(rng, side, 8, 3) - 0.5), 0, 1, dtype=np.float32)
    accent = (hue + rng.normal(0, 0.07), rng.uniform(0.1, 0.8), rng.uniform(0.8, 1.0))
    deep = (hue + rng.normal(0, 0.02), rng.uniform(0.75, 1.0), rng.uniform(0.35, 0.65))
    plain = (hue, rng.uniform(0.65, 0.95), rng.uniform(0.7, 1.0))
    return _paint(field, ramp([deep, plain, accent]))


def background_texture(
    rng: np.random.Generator, side: int, hue: float
) -> UInt8[np.ndarray, "h w 3"]:
    """A muted texture: clouds, on every second clip mixed with a faint pattern."""
    field = noise(rng, side, int(rng.integers(2, 6)), 5)
    if rng.random() < 0.5:
        share = rng.uniform(0.2, 0.5)
        field = (1 - share) * field + share * FIELDS[rng.integers(1, len(FIELDS))](rng, side)
    light = rng.uniform(0.45, 0.95)
    colours = [
        (hue + rng.normal(0, 0.05), rng.uniform(0.1, 0.45), light * rng.uniform(0.25, 0.6)),
        (hue + rng.normal(0, 0.03), rng.uniform(0.1, 0.5), light * rng.uniform(0.6, 0.8)),
        (hue + rng.normal(0, 0.08), rng.uniform(0.05, 0.4), light),
    ]
    return _paint(np.clip(field, 0, 1, dtype=np.float32), ramp(colours))
