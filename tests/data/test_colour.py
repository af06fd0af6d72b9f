"""Colour against Pillow's own enhancers, which torchvision calls."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sam2_jax.data.colour import GREY, KINDS, Op, adjust, draw_jitter

ONE_LEVEL = 1  # OpenCV multiplies in fixed point, and Pillow rounds the grey it blends with
# Six cuts of fractions in a row: a level of difference in one moves the cuts of the next ones.
TWO_LEVELS = 0.99  # share of values within two levels after a clip's and a frame's jitter
CHAIN = 6  # levels, one a cut
PILLOW = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def pillow(image, ops):
    for op in ops:
        if op == GREY:
            image = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
        else:
            image = np.asarray(PILLOW[op.kind](Image.fromarray(image)).enhance(op.factor))
    return image


def changed(image, ops):
    image = image.copy()
    adjust(image, ops)
    return image


def pictures():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 130, 3), np.uint8)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    smooth = cv2.resize(coarse, (400, 300), interpolation=cv2.INTER_CUBIC)
    screen = np.zeros((640, 640, 3), np.uint8)
    screen[::2, ::2] = screen[1::2, 1::2] = 255
    return {"noise": noise, "smooth": smooth, "screen": screen}


@pytest.mark.parametrize("name", pictures())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.03, 0.5, 0.95, 1.07, 1.6])
def test_one_blend_is_pillows(name, kind, factor):
    image, ops = pictures()[name], [Op(kind, factor)]
    difference = changed(image, ops).astype(int) - pillow(image, ops)
    assert np.abs(difference).max() <= ONE_LEVEL


@pytest.mark.parametrize("name", pictures())
def test_grey_is_pillows_and_saturation_then_changes_nothing(name):
    image = pictures()[name]
    grey = changed(image, [GREY])
    assert np.ptp(grey, -1).max() == 0
    assert np.abs(grey.astype(int) - pillow(image, [GREY])).max() <= ONE_LEVEL
    np.testing.assert_array_equal(changed(image, [GREY, Op("saturation", 1.7)]), grey)


@pytest.mark.parametrize("name", ["noise", "smooth"])
def test_two_jitters_are_pillows_to_a_few_levels(name):
    image, rng = pictures()[name], np.random.default_rng(1)
    for n in range(12):
        ops = draw_jitter(rng, (0.1, 0.03, 0.03)) + [GREY] * (n % 4 == 3)
        ops += draw_jitter(rng, (0.1, 0.05, 0.05))
        difference = np.abs(changed(image, ops).astype(int) - pillow(image, ops))
        assert (difference <= 2).mean() >= TWO_LEVELS and difference.max() <= CHAIN


def test_factor_one_leaves_every_level_alone():
    image = pictures()["noise"]
    np.testing.assert_array_equal(changed(image, [Op(kind, 1.0) for kind in KINDS]), image)


def test_a_strided_view_is_changed_in_place():
    large = pictures()["smooth"]
    before = large.copy()
    adjust(large[10:60, 20:90], [Op("brightness", 0.5)])
    np.testing.assert_array_equal(large[10:60, 20:90], before[10:60, 20:90] // 2)
    large[10:60, 20:90] = before[10:60, 20:90]
    np.testing.assert_array_equal(large, before)


def test_factors_are_uniform_and_the_order_is_random():
    rng = np.random.default_rng(0)
    draws = [draw_jitter(rng, (0.1, 1.5, 0.0)) for _ in range(3000)]
    orders = [tuple(op.kind for op in ops) for ops in draws]
    assert {orders.count(order) / 3000 for order in set(orders)} <= set(np.arange(400, 601) / 3000)
    assert len(set(orders)) == 6
    factors = {kind: np.array([dict(ops)[kind] for ops in draws]) for kind in KINDS}
    for kind, low, high in (("brightness", 0.9, 1.1), ("contrast", 0.0, 2.5)):
        found = factors[kind]
        assert low <= found.min() < low + 0.01 * high and high - 0.01 * high < found.max() <= high
        assert found.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
    assert (factors["saturation"] == 1).all()
