"""Resizing against a plain statement of the reference's antialiased bilinear filter."""

import numpy as np
import pytest

from sam2_jax.data.transforms import (
    fitted_size,
    pad_frames,
    pad_masks,
    resize_clip,
    resize_frames,
    resize_masks,
)

ONE_LEVEL = 1.01  # fixed-point arithmetic on 8 bits, in Pillow and in OpenCV alike
SIZES = [(24, 40, 64), (48, 80, 16), (20, 70, 32), (32, 32, 16), (32, 32, 64), (33, 17, 17)]


def filter_matrix(size: int, target: int) -> np.ndarray:
    """Weights [target, size] of bilinear resizing with antialiasing: a triangle, normalised."""
    scale = size / target
    centres = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(size) - centres) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


def smooth_image(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 3 + c) * np.cos(y / 4 - c) for c in range(3)]
    return np.clip(127 + 120 * np.stack(waves, -1), 0, 255).astype(np.uint8)


def blocky_masks(height, width):
    masks = np.random.default_rng(0).random((3, height // 4 + 1, width // 4 + 1)) < 0.4
    return masks.repeat(4, 1).repeat(4, 2)[:, :height, :width]


def assert_filtered(masks, found, height, width):
    cover = filter_matrix(masks.shape[1], height) @ masks @ filter_matrix(masks.shape[2], width).T
    clear = np.abs(cover - 0.5) > 1e-6  # a half itself depends on rounding in the last bit
    np.testing.assert_array_equal(found[clear], cover[clear] > 0.5)


@pytest.mark.parametrize("height, width, side", SIZES)
def test_frames_match_the_filter(height, width, side):
    image = smooth_image(height, width)
    expected = np.einsum(
        "yh,hwc,xw->yxc", filter_matrix(height, side), image, filter_matrix(width, side)
    )
    found = resize_frames(image[None], side)[0]
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= ONE_LEVEL


@pytest.mark.parametrize("height, width, side", SIZES)
def test_masks_match_the_filter_with_halves_rounded_down(height, width, side):
    masks = blocky_masks(height, width)
    assert_filtered(masks, resize_masks(masks, side), side, side)


def test_exactly_half_covered_is_background():
    mask = np.zeros((1, 8, 8), bool)
    mask[:, :, 3:] = True  # halving: column 1 has weights 1 3 3 1 on columns 1 to 4
    assert not resize_masks(mask, 4)[0, :, 1].any() and resize_masks(mask, 4)[0, :, 2:].all()


def test_masks_match_torch():
    torch = pytest.importorskip("torch")
    masks = np.random.default_rng(1).random((4, 12, 20)).repeat(4, 1).repeat(4, 2) < 0.3
    for side in (16, 32, 64, 128):
        with torch.no_grad():
            reference = torch.nn.functional.interpolate(
                torch.from_numpy(masks)[:, None].float(), (side, side), mode="bilinear",
                antialias=True, align_corners=False,
            ).round()  # fmt: skip
        np.testing.assert_array_equal(resize_masks(masks, side), reference[:, 0].numpy() > 0)


def test_square_of_the_right_size_is_left_alone():
    image, mask = smooth_image(16, 16)[None], np.eye(16, dtype=bool)[None]
    assert resize_frames(image, 16) is image and resize_masks(mask, 16) is mask


@pytest.mark.parametrize("size", [(24, 40), (12, 60), (48, 10), (24, 80)])
def test_a_clip_is_resized_to_any_rectangle(size):
    image, masks = smooth_image(24, 40), blocky_masks(24, 40)
    frames, covers = resize_clip(image[None], masks[None], size)
    assert frames.shape == (1, *size, 3) and covers.shape == (1, 3, *size)
    expected = np.einsum(
        "yh,hwc,xw->yxc", filter_matrix(24, size[0]), image, filter_matrix(40, size[1])
    )
    assert np.abs(frames[0] - expected).max() <= ONE_LEVEL
    assert_filtered(masks, covers[0], *size)


def test_longer_side_fits_and_the_rest_is_padded_right_and_below():
    assert fitted_size(480, 854, 1024) == (576, 1024)
    assert fitted_size(640, 320, 64) == (64, 32) and fitted_size(1, 999, 64) == (1, 64)
    frames, masks = np.full((2, 3, 4, 3), 9, np.uint8), np.ones((2, 1, 3, 4), bool)
    padded, kept = pad_frames(frames, 5, (1, 2, 3)), pad_masks(masks, 5)
    assert padded.shape == (2, 5, 5, 3) and kept.shape == (2, 1, 5, 5)
    assert (padded[:, :3, :4] == 9).all() and kept[:, :, :3, :4].all() and kept.sum() == 24
    assert (padded[:, 3:] == (1, 2, 3)).all() and (padded[:, :, 4:] == (1, 2, 3)).all()
