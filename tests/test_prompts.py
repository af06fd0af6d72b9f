"""Plans, clicks and boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import prompts
from sam2_jax.prompts import PromptSettings

DRAWS = 4000
# Five standard deviations of a frequency over DRAWS: one false alarm in two million
SPREAD = 5 * np.sqrt(0.25 / DRAWS)


@pytest.fixture(scope="module")
def plans():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.device_get(
        jax.jit(jax.vmap(lambda k: prompts.sample_plan(k, 8, PromptSettings())))(keys)
    )


def test_plan_probabilities_are_the_reference_s(plans):
    points = plans.use_points
    two = plans.is_cond.sum(1) == 2
    assert abs(points.mean() - 0.5) < SPREAD
    assert abs(two.mean() - 0.5) < SPREAD
    # A box is drawn for each conditioning frame on its own
    assert abs(plans.is_box[points][plans.is_cond[points]].mean() - 0.5) < 2 * SPREAD
    # One conditioning frame: one or two corrected ones. Two: always both.
    corrected = plans.is_corrected.sum(1)
    assert abs((corrected[points & ~two] == 2).mean() - 0.5) < 2 * SPREAD
    assert (corrected[points & two] == 2).all()
    assert abs(plans.from_truth.mean() - 0.1) < SPREAD
    # Any frame but the first is as likely as any other
    share = plans.is_cond[two].mean(0)
    assert share[0] == 1 and np.abs(share[1:] - 1 / 7).max() < 2 * SPREAD


def test_plan_is_consistent(plans):
    t = np.arange(8)
    assert (np.sort(plans.order, 1) == t).all()
    assert plans.is_cond[:, 0].all()
    assert not plans.is_corrected[~plans.use_points].any()
    assert (plans.is_corrected | ~plans.is_cond)[plans.use_points].all()
    assert not plans.is_box[~plans.use_points].any()
    for order, cond in zip(plans.order[:200], plans.is_cond[:200], strict=True):
        assert order.tolist() == t[cond].tolist() + t[~cond].tolist()


def test_a_single_image_always_gets_points():
    for seed in range(20):
        plan = prompts.sample_plan(jax.random.key(seed), 1, PromptSettings())
        assert bool(plan.use_points) and plan.is_cond.tolist() == [True]
        assert plan.is_corrected.tolist() == [True]


def test_uniform_click_takes_every_wrong_pixel_equally():
    truth = np.zeros((1, 1, 6, 7), bool)
    truth[0, 0, 1:4, 2:5] = True
    guess = np.zeros_like(truth)
    guess[0, 0, 2:6, 3:6] = True
    wrong = truth[0, 0] ^ guess[0, 0]
    keys = jax.random.split(jax.random.key(0), DRAWS)
    click = jax.jit(jax.vmap(lambda k: prompts.uniform_click(k, truth, guess)))
    points, labels = jax.device_get(click(keys))
    x, y = points[:, 0, 0].astype(int).T
    hits = np.zeros(wrong.shape, int)
    np.add.at(hits, (y, x), 1)
    assert (hits[~wrong] == 0).all()
    assert np.abs(hits[wrong] / DRAWS - 1 / wrong.sum()).max() < SPREAD
    np.testing.assert_array_equal(labels[:, 0, 0], truth[0, 0, y, x])


@pytest.mark.parametrize("full", [True, False])
def test_uniform_click_where_nothing_is_wrong(full):
    truth = np.zeros((1, 2, 5, 5), bool)
    truth[0, 0, 1:3] = True
    truth[0, 1] = full
    for seed in range(20):
        points, labels = prompts.uniform_click(jax.random.key(seed), truth, truth)
        x, y = np.asarray(points[0, 0], int)
        assert not truth[0, 0, y, x] and labels.tolist() == [[0, 0]]
        if full:
            assert points[0, 1].tolist() == [0, 0]


def test_centre_click_is_the_innermost_wrong_pixel():
    truth = np.zeros((1, 2, 20, 20), bool)
    truth[0, 0, 2:9, 4:11] = True  # missed altogether: centre (7, 5)
    guess = np.zeros_like(truth)
    guess[0, 1, 10:13, 10:13] = True  # not there: centre (11, 11)
    points, labels = prompts.centre_click(jax.random.key(0), truth, guess)
    assert points.tolist() == [[[7, 5], [11, 11]]]
    assert labels.tolist() == [[1, 0]]


def test_box_is_near_and_inside_and_never_for_nothing():
    truth = np.zeros((1, 3, 64, 80), bool)
    truth[0, 0, 10:30, 20:61] = True
    truth[0, 1, 60:, 70:] = True
    corners = []
    for seed in range(50):
        points, labels = prompts.noisy_box(jax.random.key(seed), truth)
        assert labels.tolist() == [[[2, 3], [2, 3], [-1, -1]]]
        corners.append(np.asarray(points[0, :2]))
    corners = np.stack(corners)
    exact = np.array([[20, 10], [60, 29]])
    reach = np.array([4.0, 1.9])  # a tenth of (40, 19)
    away = np.abs(corners[:, 0] - exact)
    assert (away <= reach + 1e-5).all() and (away.max(0) > 0.8 * reach).all()
    assert (corners[:, 1] >= 0).all() and (corners[:, 1, 1] <= [79, 63]).all()


def test_box_noise_is_limited_in_pixels():
    truth = np.ones((1, 1, 1000, 1000), bool)
    left = [float(prompts.noisy_box(jax.random.key(s), truth)[0][0, 0, 0, 0]) for s in range(30)]
    assert 10 < max(left) <= 20


def test_mask_plan():
    plan = prompts.mask_plan(4)
    assert plan.is_cond.tolist() == [True, False, False, False]
    assert not bool(plan.use_points) and plan.from_truth.shape == (4, 0)
    assert jnp.array_equal(plan.order, jnp.arange(4))
