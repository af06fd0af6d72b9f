"""Rotation, shear and zoom against Pillow and torchvision."""

import cv2
import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.affine import FAR, inverse_matrix, sampling_maps, warp_frames, warp_masks

FILL = (123, 116, 103)
RED, GREEN = np.array([[250, 10, 60], [0, 200, 160]], np.uint8)
# Pillow cuts fractions off, OpenCV rounds. Before version 5 OpenCV takes coordinates in steps of
# 1/32 pixel, which adds 1/64 of the contrast between neighbours: at most 50 levels here.
ONE_LEVEL = 1 if int(cv2.__version__.split(".")[0]) >= 5 else 2
# Positions half-way between pixels: Pillow works in fixed point, torchvision in float32.
NEAREST_TIES = 1e-3  # share of pixels
CASES = [(13.0, -11.0, 1.0), (-25.0, 20.0, 1.0), (0.0, 7.0, 1.3), (89.0, 0.0, 0.6), (4.0, 0.0, 2.0)]
SIZES = [(48, 80), (61, 33)]


def smooth_image(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + c) * np.cos(y / 6 - c) for c in range(3)]
    return np.clip(127 + 120 * np.stack(waves, -1), 0, 255).astype(np.uint8)


def discs(height, width, count=3):
    y, x = np.mgrid[:height, :width]
    at = [(height * (0.3 + 0.05 * k), width * (0.2 + 0.07 * k)) for k in range(count)]
    return np.stack([(y - a) ** 2 + (x - b) ** 2 < (height / 5) ** 2 for a, b in at])


def pillow(array, matrix, how, fill):
    image = Image.fromarray(array)
    size, numbers = image.size, tuple(matrix.ravel())
    return np.asarray(image.transform(size, Image.Transform.AFFINE, numbers, how, fillcolor=fill))


@pytest.mark.parametrize("angle, shear, zoom", CASES)
@pytest.mark.parametrize("height, width", SIZES)
def test_frames_are_pillows(height, width, angle, shear, zoom):
    image = smooth_image(height, width)
    matrix = inverse_matrix(angle, shear, zoom, height, width)
    maps = sampling_maps(matrix, height, width)
    found = warp_frames(image[None], maps, FILL)[0].astype(int)
    expected = pillow(image, matrix, Image.Resampling.BILINEAR, FILL)
    # On the very edge of the picture rounding decides whether a pixel is inside.
    edge = ((found == FILL).all(-1)) != ((expected == FILL).all(-1))
    assert edge.mean() <= NEAREST_TIES
    assert np.abs(found - expected)[~edge].max() <= ONE_LEVEL


@pytest.mark.parametrize("angle, shear, zoom", CASES)
def test_masks_are_pillows_whatever_their_number(angle, shear, zoom):
    masks = discs(48, 80, 11)
    masks[4] = False
    matrix = inverse_matrix(angle, shear, zoom, 48, 80)
    found = warp_masks(masks[None], sampling_maps(matrix, 48, 80))[0]
    assert found.dtype == bool and not found[4].any()
    for mask, got in zip(masks, found, strict=True):
        expected = pillow(mask.view(np.uint8), matrix, Image.Resampling.NEAREST, 0) > 0
        assert (got != expected).mean() <= NEAREST_TIES


def test_the_matrix_is_torchvisions():
    # torchvision 0.29's _get_inverse_affine_matrix([40, 24], 13, [0, 0], 1.3, [-11, 0])
    expected = [[0.783151, 0.027348, 8.017608], [-0.173039, 0.749515, 12.9332]]
    np.testing.assert_allclose(inverse_matrix(13.0, -11.0, 1.3, 48, 80), expected, atol=1e-6)


def test_nothing_changes_without_a_change():
    image, masks = smooth_image(20, 30), discs(20, 30)
    maps = sampling_maps(inverse_matrix(0.0, 0.0, 1.0, 20, 30), 20, 30)
    np.testing.assert_array_equal(warp_frames(image[None], maps, FILL)[0], image)
    np.testing.assert_array_equal(warp_masks(masks[None], maps)[0], masks)


def test_a_quarter_turn_is_clockwise_and_zoom_enlarges():
    image = smooth_image(30, 30)
    turned = sampling_maps(inverse_matrix(90.0, 0.0, 1.0, 30, 30), 30, 30)
    np.testing.assert_array_equal(warp_frames(image[None], turned, FILL)[0], np.rot90(image, -1))
    square = np.zeros((1, 1, 30, 30), bool)
    square[..., 10:20, 10:20] = True
    larger = sampling_maps(inverse_matrix(0.0, 0.0, 1.5, 30, 30), 30, 30)
    assert warp_masks(square, larger)[0, 0, 8:22, 8:22].all()
    assert warp_masks(square, larger).sum() == pytest.approx(15 * 15, abs=31)


def test_outside_is_fill_and_the_edge_is_not_blended():
    white = np.full((1, 40, 40, 3), 255, np.uint8)
    maps = sampling_maps(inverse_matrix(30.0, 0.0, 1.0, 40, 40), 40, 40)
    found = warp_frames(white, maps, FILL)[0]
    outside = maps.x == FAR
    assert 0.05 < outside.mean() < 0.4
    assert (found[outside] == FILL).all() and (found[~outside] == 255).all()


@pytest.mark.parametrize("angle, shear, zoom", CASES)
def test_masks_move_with_the_pixels(angle, shear, zoom):
    height, width = 96, 120
    masks = discs(height, width, 1)
    image = np.where(masks[0][..., None], RED, GREEN)
    maps = sampling_maps(inverse_matrix(angle, shear, zoom, height, width), height, width)
    found = warp_frames(image[None], maps, FILL)[0]
    moved = warp_masks(masks[None], maps)[0, 0]
    assert moved.any()
    kernel, byte = np.ones((5, 5), np.uint8), moved.view(np.uint8)
    inner = cv2.erode(byte, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    outer = cv2.dilate(byte, kernel)
    assert (found[inner > 0] == RED).all()
    assert not (found[outer == 0] == RED).all(-1).any()


@pytest.mark.parametrize("angle, shear, zoom", CASES)
def test_the_transform_is_torchvisions(angle, shear, zoom):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchvision.transforms.functional")
    modes = functional.InterpolationMode
    image, masks = smooth_image(48, 80), discs(48, 80)
    maps = sampling_maps(inverse_matrix(angle, shear, zoom, 48, 80), 48, 80)
    arguments = angle, [0, 0], zoom, [shear, 0.0]
    expected = np.asarray(
        functional.affine(
            Image.fromarray(image), *arguments, interpolation=modes.BILINEAR, fill=list(FILL)
        )
    )
    found = warp_frames(image[None], maps, FILL)[0].astype(int)
    edge = ((found == FILL).all(-1)) != ((expected == FILL).all(-1))
    assert edge.mean() <= NEAREST_TIES
    assert np.abs(found - expected)[~edge].max() <= ONE_LEVEL
    for mask, got in zip(masks, warp_masks(masks[None], maps)[0], strict=True):
        tensor = torch.from_numpy(mask.view(np.uint8))[None]
        reference = functional.affine(tensor, *arguments, interpolation=modes.NEAREST, fill=[0.0])
        assert (got != reference[0].numpy().astype(bool)).mean() <= NEAREST_TIES
