"""Rotation, shear and zoom of a clip about its centre, pixels and masks together.

As torchvision's `affine` does it with a Pillow image (bilinear) and with tensor masks (nearest):
positions outside the frame take the fill colour, positions less than half a pixel inside its edge
the colour of the edge. OpenCV's `remap` blends the fill over the edge instead; coordinates are
therefore clamped for what lies inside and sent far away for what lies outside.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from sam2_jax.data.transforms import Colour

FAR = -8.0  # pixels: so far outside that the fill is all there is
PACK = 8  # masks that share the bits of a byte, and one warp


class Maps(NamedTuple):
    """Where in the source every output pixel is sampled: pixels, centres at whole numbers."""

    x: Float[np.ndarray, "h w"]
    y: Float[np.ndarray, "h w"]


def inverse_matrix(
    angle: float, shear: float, zoom: float, height: int, width: int
) -> Float[np.ndarray, "2 3"]:
    """Where an output position comes from: `source = matrix @ (x, y, 1)`, corner at (0, 0).

    Forwards: shear along x, zoom, then rotate, all about the centre (torchvision's
    `_get_inverse_affine_matrix` with a shear of y of 0 and no translation).

    Args:
        angle: degrees, clockwise on the screen.
        shear: degrees; positive ones lean the clip's top to the right.
        zoom: factor; above 1 enlarges.
        height: of the clip, pixels.
        width: of the clip, pixels.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = np.array([[cos, -sin], [sin, cos]])
    lean = np.array([[1, -math.tan(math.radians(shear))], [0, 1]])
    inverse = np.linalg.inv(zoom * turn @ lean)
    centre = np.array([width / 2, height / 2])
    return np.column_stack([inverse, centre - inverse @ centre])


def sampling_maps(matrix: Float[np.ndarray, "2 3"], height: int, width: int) -> Maps:
    """Coordinates to sample at for every pixel of a clip, from `inverse_matrix`."""
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    outside = np.zeros((height, width), bool)
    maps = Maps(np.empty((height, width), np.float32), np.empty((height, width), np.float32))
    for at, (by_x, by_y, offset), size in zip(maps, matrix, (width, height), strict=True):
        np.add((by_x * x + offset - 0.5).astype("f4"), (by_y * y).astype("f4"), out=at)
        outside |= (at < -0.5) | (at >= size - 0.5)
        np.clip(at, 0, size - 1, out=at)
    maps.x[outside] = FAR
    return maps


def warp_frames(
    frames: UInt8[np.ndarray, "t h w 3"], maps: Maps, fill: Colour
) -> UInt8[np.ndarray, "t h w 3"]:
    """Warp bilinearly, `fill` outside.

    Within one level of Pillow, which cuts fractions off where this rounds. OpenCV before 5 takes
    coordinates in steps of 1/32 pixel: up to 1/64 of the contrast between neighbours more.
    """
    out = np.empty_like(frames)
    for frame, target in zip(frames, out, strict=True):
        _remap(frame, maps, target, cv2.INTER_LINEAR, fill)
    return out


def warp_masks(masks: Bool[np.ndarray, "t o h w"], maps: Maps) -> Bool[np.ndarray, "t o h w"]:
    """Warp with the nearest pixel, background outside."""
    flat = masks.reshape(-1, *masks.shape[2:]).view(np.uint8)
    out = np.zeros_like(flat)
    filled = [n for n, mask in enumerate(flat) if mask.any()]
    for start in range(0, len(filled), PACK):
        group = filled[start : start + PACK]
        packed = np.zeros(flat.shape[1:], np.uint8)
        for bit, n in enumerate(group):
            packed |= flat[n] << np.uint8(bit)
        warped = np.empty_like(packed)
        _remap(packed, maps, warped, cv2.INTER_NEAREST, (0, 0, 0))
        for bit, n in enumerate(group):
            np.bitwise_and(warped >> np.uint8(bit), 1, out=out[n])
    return out.view(bool).reshape(masks.shape)


def _remap(source: np.ndarray, maps: Maps, target: np.ndarray, how: int, fill: Colour) -> None:
    cv2.remap(
        source, maps.x, maps.y, how, dst=target, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )
