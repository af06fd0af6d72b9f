"""The 2 x 2 mosaic: what is in its cells, and the reference's own."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.mosaic import mosaic
from sam2_jax.data.transforms import resize_clip

PLAIN = np.zeros(4, bool)


def clip(height=40, width=60):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, height // 4 + 1, width // 4 + 1, 3), np.uint8)
    frames = frames.repeat(4, 1).repeat(4, 2)[:, :height, :width].copy()
    masks = np.zeros((2, 2, height, width), bool)
    masks[:, 0, 4:20, 4:24], masks[1, 1, 24:, 30:] = True, True
    return frames, masks


def test_every_cell_shows_the_clip_and_one_keeps_the_objects():
    frames, masks = clip()
    small, cover = resize_clip(frames, masks, (20, 30))
    for target in range(4):
        images, kept = mosaic(frames, masks, target, PLAIN)
        for cell in range(4):
            y, x = 20 * (cell // 2), 30 * (cell % 2)
            np.testing.assert_array_equal(images[:, y : y + 20, x : x + 30], small)
            expected = cover if cell == target else np.zeros_like(cover)
            np.testing.assert_array_equal(kept[..., y : y + 20, x : x + 30], expected)


def test_mirrored_cells_mirror_pixels_and_masks():
    frames, masks = clip()
    small, cover = resize_clip(frames, masks, (20, 30))
    images, kept = mosaic(frames, masks, 1, np.array([False, True, False, True]))
    np.testing.assert_array_equal(images[:, :20, :30], small)
    np.testing.assert_array_equal(images[:, :20, 30:], small[:, :, ::-1])
    np.testing.assert_array_equal(images[:, 20:, 30:], small[:, :, ::-1])
    np.testing.assert_array_equal(kept[..., :20, 30:], cover[..., ::-1])


def test_cells_of_an_odd_size_leave_no_gap():
    frames = np.full((1, 41, 63, 3), 77, np.uint8)
    images, kept = mosaic(frames, np.ones((1, 1, 41, 63), bool), 3, PLAIN)
    assert (images == 77).all() and kept[0, 0, 20:, 31:].all() and kept.sum() == 21 * 32


@pytest.mark.parametrize("height, width", [(40, 60), (41, 63)])
def test_it_is_the_references(height, width):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    transforms = pytest.importorskip("training.dataset.transforms")
    frames, masks = clip(height, width)
    mirrored = np.array([True, False, False, True])
    images, kept = mosaic(frames, masks, 2, mirrored)
    for t in range(len(frames)):
        objects = [SimpleNamespace(segment=torch.from_numpy(m.view(np.uint8))) for m in masks[t]]
        point = SimpleNamespace(
            frames=[SimpleNamespace(data=Image.fromarray(frames[t]), objects=objects)]
        )
        transforms.random_mosaic_frame(
            point, 0, 2, 2, 1, 0, torch.from_numpy(mirrored).reshape(2, 2)
        )
        np.testing.assert_array_equal(images[t], np.asarray(point.frames[0].data))
        for found, expected in zip(kept[t], objects, strict=True):
            np.testing.assert_array_equal(found, expected.segment.numpy() > 0)
