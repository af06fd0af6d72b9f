"""Transforms against a plain statement of the reference's antialiased bilinear filter."""

import numpy as np
import pytest

from sam2_jax.data.transforms import flip, object_masks, resize_frames, resize_masks

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
    masks = np.random.default_rng(0).random((3, height // 4 + 1, width // 4 + 1)) < 0.4
    masks = masks.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    cover = filter_matrix(height, side) @ masks @ filter_matrix(width, side).T
    found = resize_masks(masks, side)
    clear = np.abs(cover - 0.5) > 1e-6  # a half itself depends on rounding in the last bit
    np.testing.assert_array_equal(found[clear], cover[clear] > 0.5)


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


def test_flip_mirrors_frames_and_labels_alike():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    flipped, labels = flip(frames, frames[..., 0])
    np.testing.assert_array_equal(flipped[:, :, 0], frames[:, :, 3])
    np.testing.assert_array_equal(labels, flipped[..., 0])


def test_object_masks_are_padded_and_empty_where_absent():
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[0, :4], labels[1, 4:], labels[0, 6:] = 5, 2, 9
    masks, valid = object_masks(labels, [2, 5], 4, 16)
    assert masks.shape == (2, 4, 16, 16) and valid.tolist() == [True, True, False, False]
    assert masks.any((2, 3)).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert masks[1, 0, 8:].all() and not masks[1, 0, :8].any()
