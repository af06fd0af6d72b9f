"""Clips in memory, and what tests of packed clips share."""

import numpy as np

from sam2_jax.data.packed_format import Index
from sam2_jax.data.packing import pack_source
from sam2_jax.data.sources import Video, VideoSource
from sam2_jax.types import UserError


class Arrays:
    """Masks of every frame by id. Clips named `broken` cannot be read to their end."""

    name = "arrays"

    def __init__(self, clips: list[list[dict[int, np.ndarray]]], broken: tuple[int, ...] = ()):
        self.clips, self.broken, self.notes = clips, broken, ["made up"]
        self.size = next(m.shape for clip in clips for masks in clip for m in masks.values())

    def __len__(self) -> int:
        return len(self.clips)

    def video(self, index: int) -> Video:
        return Video(f"set/clip {index}", len(self.clips[index]), *self.size)

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        return tuple(sorted(self.clips[index][frame]))

    def read(self, index, frames, objects):
        if index in self.broken and len(self.clips[index]) - 1 in frames:
            raise UserError(f"clip {index}.jpg is broken")
        rng = np.random.default_rng(index)
        images = rng.integers(0, 256, (len(self.clips[index]), *self.size, 3), np.uint8)
        none = np.zeros(self.size, bool)
        masks = [[self.clips[index][t].get(k, none) for k in objects] for t in frames]
        return images[list(frames)], np.array(masks).reshape(len(frames), len(objects), *self.size)


def random_masks(ids, seed=0, size=(7, 9)):
    rng = np.random.default_rng(seed)
    return {k: rng.random(size) < 0.4 for k in ids}  # they overlap


def some_clips(count=6, frames=3):
    return [[random_masks((1, 2), i + t) for t in range(frames)] for i in range(count)]


def assert_same(one: VideoSource, two: VideoSource) -> None:
    assert len(one) == len(two) > 0
    for i in range(len(one)):
        assert one.video(i) == two.video(i)
        length = one.video(i).num_frames
        seen = [one.objects(i, t) for t in range(length)]
        assert seen == [two.objects(i, t) for t in range(length)]
        ids = sorted({k for ids in seen for k in ids}, reverse=True) + [250]  # absent
        frames = [length - 1, *range(length), 0]
        for a, b in zip(one.read(i, frames, ids), two.read(i, frames, ids), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def pack(source: VideoSource, root, **more) -> Index:
    """`pack_source` with some settings."""
    return pack_source(source, root, **{"settings": {"root": "here"}, **more})
