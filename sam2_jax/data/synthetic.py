"""Clips rendered on the fly: textured objects that move, turn, deform, hide and return.

Nothing is downloaded and nothing is stored: a clip is a pure function of a seed and its index,
motion is a smooth function of time, so that any frame can be rendered alone, and the masks are
exact. It serves as a first training set, as a test bed, and where no video is at hand.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from sam2_jax.data.shapes import Outline, random_outline
from sam2_jax.data.sources import Video
from sam2_jax.data.textures import background_texture, object_texture

REACH = 1.7  # an object's texture covers this many of its radii
PROBE = 48  # side in pixels of the picture on which the first frame's visibility is judged
LEAVES = 1 / 8  # share of objects that leave the picture and come back
TRIES = 6  # places tried for an object before the clip does without it


class Motion(NamedTuple):
    """Channels `start + rate t + sum_k size sin(2 pi t / period + phase)`, zero waves at t = 0."""

    start: Float[np.ndarray, " c"]
    rate: Float[np.ndarray, " c"]  # per frame
    size: Float[np.ndarray, "k c"]
    period: Float[np.ndarray, "k c"]  # frames
    phase: Float[np.ndarray, "k c"]

    def __call__(self, t: int) -> Float[np.ndarray, " c"]:
        """All channels on one frame."""
        waves = np.sin(2 * np.pi * t / self.period + self.phase) - np.sin(self.phase)
        return self.start + self.rate * t + (self.size * waves).sum(0)


class Thing(NamedTuple):
    """An object: channels of its motion are x, y (frame sides), angle, log radius, phase."""

    label: int
    outline: Outline
    motion: Motion
    texture: UInt8[np.ndarray, "h w 3"]


class Clip(NamedTuple):
    """A scene: things from nearest to farthest, over a moving background."""

    things: list[Thing]
    background: UInt8[np.ndarray, "h w 3"]
    camera: Motion  # channels x, y (texture sides), angle, log zoom, brightness
    grain: UInt8[np.ndarray, "h w 3"]


def _thing_motion(rng: np.random.Generator, speed: float) -> Motion:
    """Slow sweeps there and back, with smaller and faster ones on top.

    The sizes are tuned so that over 16 frames a first-frame mask left standing overlaps its
    object by a third, while consecutive masks overlap by three quarters; one object in eight is
    sent over the edge of the picture and returns.
    """
    radius = rng.uniform(0.16, 0.28)
    place = rng.uniform(0.22, 0.78, 2)
    heading = rng.uniform(0, 2 * np.pi)
    sweep = rng.uniform(0.1, 0.24) * np.array([np.cos(heading), np.sin(heading)])
    period = np.stack([rng.uniform(28, 48, 5), rng.uniform(12, 20, 5), rng.uniform(6, 10, 5)])
    phase = rng.uniform(-1.0, 1.0, (3, 5))
    if rng.random() < LEAVES:
        side, sign = rng.integers(2), rng.choice([-1, 1])
        place[side] = 0.5 + 0.3 * sign
        sweep[side] = sign * (0.2 + 1.15 * radius)
        period[0, side], phase[0, side] = rng.uniform(28, 34), 0
    size = np.zeros((3, 5))
    size[0, :2] = sweep
    size[1, :2] = rng.normal(0, 0.012, 2)
    size[2, :2] = rng.normal(0, 0.004, 2)
    size[0, 2:] = [rng.normal(0, 0.3), rng.normal(0, 0.14), 0]
    size[1, 2:] = [rng.normal(0, 0.1), rng.normal(0, 0.04), 0]
    rate = np.array([0, 0, rng.normal(0, 0.03), 0, rng.uniform(0.12, 0.4)])
    start = np.array([*place, rng.uniform(0, 7), np.log(radius), 0])
    return Motion(start, rate * speed, size, period / speed, phase)


def _camera_motion(rng: np.random.Generator, speed: float) -> Motion:
    size = rng.normal(0, 1, (2, 5)) * [0.05, 0.05, 0.06, 0.06, 0.05]
    period = rng.uniform(16, 48, (2, 5)) / speed
    rate = speed * rng.normal(0, 1, 5) * [0.006, 0.006, 0.004, 0, 0]
    start = np.array([0.5, 0.5, rng.uniform(0, 7), np.log(0.62), 1.0])
    return Motion(start, rate, size, period, rng.uniform(0, 7, (2, 5)))


def _curves(thing: Thing, t: int, side: int) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Parts as pixel coordinates [n, 2] in 1/16, and the texture's affine map."""
    x, y, angle, log_radius, phase = thing.motion(t)
    turn = np.exp(log_radius + 1j * angle) * side
    centre = (x + 1j * y) * side - (0.5 + 0.5j)  # pixel centres are at whole numbers
    parts = [
        [np.stack([c.real, c.imag], -1) for c in [centre + turn * curve for curve in part]]
        for part in thing.outline(phase)
    ]
    texture_side = thing.texture.shape[0]
    back = texture_side / (2 * REACH) / turn
    offset = texture_side / 2 * (1 + 1j) - back * centre
    matrix = np.array([[back.real, -back.imag, offset.real], [back.imag, back.real, offset.imag]])
    return parts, matrix


def _draw(parts: list[list[np.ndarray]], corner: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Coverage 0-255 of the union of parts, in the window that starts at `corner` (x, y)."""
    cover = np.zeros(shape, np.uint8)
    for part in parts:
        fixed = [np.round(16 * (curve - corner)).astype(np.int32) for curve in part]
        cv2.fillPoly(cover, fixed, 255, cv2.LINE_AA, 4)  # pyright: ignore
    return cover


def _window(parts: list[list[np.ndarray]], side: int) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Corner (x, y) and shape (h, w) of the part of the picture that the curves touch."""
    points = np.concatenate([part[0] for part in parts])
    low = np.clip(np.floor(points.min(0)).astype(int) - 1, 0, side)
    high = np.clip(np.ceil(points.max(0)).astype(int) + 2, 0, side)
    width, height = (int(v) for v in high - low)
    return (low, (height, width)) if width > 0 and height > 0 else None


def _visible_at_start(things: list[Thing], new: Thing) -> bool:
    """Is at least half of an object, placed behind the others, seen on the first frame?"""
    seen = _draw(_curves(new, 0, PROBE)[0], np.zeros(2), (PROBE, PROBE)) > 127
    whole = _draw(_curves(new, 0, PROBE)[0], np.full(2, -PROBE), (3 * PROBE, 3 * PROBE)) > 127
    for thing in things:
        seen &= _draw(_curves(thing, 0, PROBE)[0], np.zeros(2), (PROBE, PROBE)) <= 127
    return bool(2 * seen.sum() >= whole.sum())


@functools.lru_cache(maxsize=8)  # frames of a clip are asked for in several calls, by few threads
def make_clip(entropy: tuple[int, ...], side: int, max_objects: int, speed: float) -> Clip:
    """Draw a scene. `entropy` names it; `side` (pixels) sets only the detail of its textures."""
    rng = np.random.default_rng(entropy)
    hue = rng.random()
    wanted = int(rng.integers(1, max_objects + 1))
    labels, ranks = rng.permutation(wanted) + 1, rng.permutation(wanted) + 1
    scene, look = rng.spawn(2)  # so that the scene is the same at every resolution
    things: list[Thing] = []
    for label, rank in zip(labels, ranks, strict=True):
        own_hue = hue + (rank + scene.uniform(-0.25, 0.25)) / (wanted + 1)
        texture_side = int(np.clip(0.6 * side, 48, 384))
        texture = object_texture(look, texture_side, own_hue)
        outline = random_outline(scene)
        for _ in range(TRIES):
            thing = Thing(int(label), outline, _thing_motion(scene, speed), texture)
            if not things or _visible_at_start(things, thing):
                things.append(thing)
                break
    camera = _camera_motion(scene, speed)
    background = background_texture(look, int(np.clip(1.5 * side, 96, 1024)), hue)
    grain = look.integers(0, 256, (side + 32, side + 32, 3), np.uint8)
    order = {old: new for new, old in enumerate(sorted(thing.label for thing in things), 1)}
    things = [thing._replace(label=order[thing.label]) for thing in things]
    return Clip(things, background, camera, grain)


def _backdrop(clip: Clip, t: int, side: int) -> tuple[np.ndarray, float]:
    x, y, angle, log_zoom, brightness = clip.camera(t)
    texture_side = clip.background.shape[0]
    turn = np.exp(log_zoom + 1j * angle) * texture_side / side
    offset = (x + 1j * y) * texture_side - turn * (1 + 1j) * side / 2
    matrix = np.array([[turn.real, -turn.imag, offset.real], [turn.imag, turn.real, offset.imag]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(
        clip.background, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REFLECT_101
    )
    return image, float(np.clip(brightness, 0.75, 1.25))


def render(
    clip: Clip, t: int, side: int
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """One frame, RGB, and its label map. An object owns the pixels it covers by half or more."""
    image, brightness = _backdrop(clip, t, side)
    labels = np.zeros((side, side), np.uint8)
    soft = max(3, side // 16) | 1
    for thing in reversed(clip.things):
        parts, matrix = _curves(thing, t, side)
        window = _window(parts, side)
        if window is None:
            continue
        (x, y), (height, width) = window
        cover = _draw(parts, window[0], (height, width))
        matrix[:, 2] += matrix[:, :2] @ window[0]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        paint = cv2.warpAffine(
            thing.texture, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101
        )
        # Darker towards the edge, as a round body under soft light.
        shade = 0.35 + 0.65 / 255 * cv2.blur(cover, (soft, soft)).astype(np.float32)
        alpha = cover.astype(np.float32)[..., None] / 255
        area = image[y : y + height, x : x + width]
        area[:] = area + alpha * (paint * shade[..., None] - area) + 0.5
        labels[y : y + height, x : x + width][cover > 127] = thing.label
    row, column = t * 37 % 32, t * 59 % 32
    grain = clip.grain[row : row + side, column : column + side]
    return cv2.addWeighted(image, brightness, grain, 0.06, -7.5), labels


class SyntheticSource:
    """Rendered clips. Sources of different `stream` have no clip in common, whatever the seed."""

    def __init__(
        self,
        num_clips: int,
        num_frames: int,
        size: int,
        max_objects: int = 3,
        seed: int = 0,
        stream: int = 0,
        speed: float = 1.0,
    ) -> None:
        """Frames are `size` pixels square; `speed` scales all motion."""
        self.name = "synthetic"
        self.notes: list[str] = []
        self._num_clips, self._num_frames, self._size = num_clips, num_frames, size
        self._scene = (max_objects, speed)
        self._entropy = (seed, stream)

    def __len__(self) -> int:
        """Number of clips."""
        return self._num_clips

    def video(self, index: int) -> Video:
        """Name, length and size of a clip."""
        if not 0 <= index < self._num_clips:
            raise IndexError(f"clip {index} of {self._num_clips}")
        return Video(f"synthetic-{index:05d}", self._num_frames, self._size, self._size)

    def _clip(self, index: int) -> Clip:
        max_objects, speed = self._scene
        return make_clip((*self._entropy, index), self._size, max_objects, speed)

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects visible on a frame: drawn without painting."""
        labels = self._labels(self._clip(index), frame)
        return tuple(int(k) for k in np.flatnonzero(np.bincount(labels.ravel())) if k)

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Render the frames asked for, and the masks of some objects."""
        clip = self._clip(index)
        rendered = [render(clip, t, self._size) for t in frames]
        ids = np.array(objects, np.uint8)[:, None, None]
        return np.stack([f for f, _ in rendered]), np.stack([m == ids for _, m in rendered])

    def _labels(self, clip: Clip, t: int) -> UInt8[np.ndarray, "h w"]:
        labels = np.zeros((self._size, self._size), np.uint8)
        for thing in reversed(clip.things):
            parts, _ = _curves(thing, t, self._size)
            window = _window(parts, self._size)
            if window is None:
                continue
            (x, y), (height, width) = window
            cover = _draw(parts, window[0], (height, width))
            labels[y : y + height, x : x + width][cover > 127] = thing.label
        return labels
