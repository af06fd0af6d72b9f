"""Random changes to a training clip, alike on pixels and masks. Pure: the generator decides all.

The order is that of the reference's fine-tuning recipe for MOSE (facebookresearch/sam2@2b90b9f
sam2.1_hiera_b+_MOSE_finetune.yaml): flip, affine at the original resolution, resize, colour of the
clip, grey, colour of each frame. Normalising happens on the device. The mosaic, which no released
recipe has, comes after the resize, so that its cells keep what a small video shows.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.affine import inverse_matrix, sampling_maps, warp_frames, warp_masks
from sam2_jax.data.colour import GREY, adjust, draw_jitter
from sam2_jax.data.mosaic import GRID, mosaic
from sam2_jax.data.transforms import Colour, fitted_size, pad_frames, pad_masks, resize_clip

Frames = UInt8[np.ndarray, "t h w 3"]
Masks = Bool[np.ndarray, "t o h w"]
DRAWS = 1 << 16  # 16-bit draws of the noise table


class AugmentSettings(NamedTuple):
    """What may happen to a clip. The defaults are the reference's recipe for MOSE."""

    hflip: float = 0.5  # probability of a left to right flip
    vflip: float = 0.0  # probability of an upside-down flip
    degrees: float = 25.0  # rotation, uniform in -degrees to degrees
    shear: float = 20.0  # along x, degrees, uniform in -shear to shear
    scale: tuple[float, float] = (1.0, 1.0)  # range of the zoom
    keep_aspect: bool = False  # longer side to the resolution, padded at the right and bottom
    jitter: tuple[float, float, float] = (0.1, 0.03, 0.03)  # brightness, contrast, saturation
    grayscale: float = 0.05  # probability of a grey clip
    frame_jitter: tuple[float, float, float] = (0.1, 0.05, 0.05)  # the same, drawn per frame
    mosaic: float = 0.0  # probability of a 2 x 2 mosaic
    mosaic_hflip: bool = False  # flip each cell of a mosaic or not, at random
    blur: float = 0.0  # largest sigma of a gaussian blur, pixels; uniform from 0
    noise: float = 0.0  # standard deviation of gaussian noise, levels; a camera's, so not blurred
    fill: Colour = (123, 116, 103)  # RGB outside a turned or padded frame


def augment(
    rng: np.random.Generator, frames: Frames, masks: Masks, side: int, settings: AugmentSettings
) -> tuple[UInt8[np.ndarray, "t s s 3"], Bool[np.ndarray, "t o s s"]]:
    """Augment a clip and resize it to a square of `side` pixels.

    An affine change or a mosaic that would lose an object of the first frame does not happen, as
    the affine of the reference after its one attempt. Its mosaic would lose the object.

    Args:
        rng: the only randomness. How much is drawn from it does not depend on the settings, but
            for noise, which comes last: a setting moves no other one's draws.
        frames: RGB, 0-255, original resolution; not written to.
        masks: of each object; not written to, and returned as they are where nothing is to do.
        side: pixels.
        settings: with everything off, the clip is only resized.
    """
    mirror, upend, tile, bleach = (float(x) for x in rng.random(4))
    given = frames
    frames, masks = _flip(frames, masks, mirror < settings.hflip, upend < settings.vflip)
    frames, masks = _turn(rng, frames, masks, settings)
    _, height, width, _ = frames.shape
    size = fitted_size(height, width, side) if settings.keep_aspect else (side, side)
    frames, masks = resize_clip(frames, masks, size)
    target, mirrored = int(rng.integers(GRID * GRID)), rng.random(GRID * GRID) < 0.5
    if tile < settings.mosaic:
        tiled = mosaic(frames, masks, target, mirrored & settings.mosaic_hflip)
        frames, masks = (frames, masks) if _loses(masks, tiled[1]) else tiled
    frames, masks = pad_frames(frames, side, settings.fill), pad_masks(masks, side)
    if frames is given:
        frames = frames.copy()  # what follows works in place
    whole_clip = draw_jitter(rng, settings.jitter)
    if bleach < settings.grayscale:
        whole_clip.append(GREY)
    for frame in frames:
        adjust(frame, whole_clip + draw_jitter(rng, settings.frame_jitter))
    blur = rng.uniform(0, settings.blur)
    if blur:
        for frame in frames:
            cv2.GaussianBlur(frame, (0, 0), blur, dst=frame)
    if settings.noise:
        _add_noise(rng, frames, settings.noise)
    return frames, masks


def _flip(frames: Frames, masks: Masks, left_right: bool, up_down: bool) -> tuple[Frames, Masks]:
    if not (left_right or up_down):
        return frames, masks
    code = -1 if left_right and up_down else int(left_right)  # OpenCV's: 0 is upside down
    flipped, turned = np.empty_like(frames), np.empty_like(masks)
    for frame, target in zip(frames, flipped, strict=True):
        cv2.flip(frame, code, dst=target)
    flat, out = (m.view(np.uint8).reshape(-1, *m.shape[2:]) for m in (masks, turned))
    for mask, target in zip(flat, out, strict=True):
        cv2.flip(mask, code, dst=target)
    return flipped, turned


def _turn(
    rng: np.random.Generator, frames: Frames, masks: Masks, settings: AugmentSettings
) -> tuple[Frames, Masks]:
    angle = rng.uniform(-settings.degrees, settings.degrees)
    shear = rng.uniform(-settings.shear, settings.shear)
    zoom = rng.uniform(*settings.scale)
    if (angle, shear, zoom) == (0, 0, 1):
        return frames, masks
    _, height, width, _ = frames.shape
    maps = sampling_maps(inverse_matrix(angle, shear, zoom, height, width), height, width)
    warped = warp_masks(masks, maps)
    if _loses(masks, warped):
        return frames, masks
    return warp_frames(frames, maps, settings.fill), warped


def _loses(before: Masks, after: Masks) -> bool:
    """Whether an object of the first frame is gone."""
    pairs = zip(before[0], after[0], strict=True)
    return any(old.any() and not new.any() for old, new in pairs)


def _add_noise(rng: np.random.Generator, frames: Frames, std: float) -> None:
    """Add gaussian noise, rounded to levels, of its own on every value.

    Drawn as 16-bit numbers that look up a table with every level as often as it is likely: five
    times faster than normal numbers, and pixels have no fractions anyway. Ends at 4.2 std.
    """
    last = math.ceil(4.5 * std)
    edges = np.array([math.erf((k + 0.5) / (std * math.sqrt(2))) for k in range(-last, last)])
    upto = np.round((1 + edges) / 2 * DRAWS).astype(int)
    counts = np.diff(upto, prepend=0, append=DRAWS)
    table = np.repeat(np.arange(-last, last + 1, dtype=np.int16), counts)
    for frame in frames:
        noise = table[rng.integers(DRAWS, size=frame.shape, dtype=np.uint16)]
        cv2.add(frame, noise, dst=frame, dtype=cv2.CV_8U)
