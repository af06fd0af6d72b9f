"""J and F against hand-computed values and against a plain copy of their definitions."""

import cv2
import numpy as np
import pytest

from sam2_jax import metrics


def square(top: int, left: int, side: int = 20, size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_jaccard():
    a, empty = square(10, 10), np.zeros((100, 100), bool)
    assert metrics.jaccard(a, a) == 1
    assert metrics.jaccard(empty, empty) == 1
    assert metrics.jaccard(a, empty) == metrics.jaccard(empty, a) == 0
    # Shifted by 5 of 20 columns: 15 x 20 pixels in common, 25 x 20 in all.
    assert metrics.jaccard(square(10, 15), a) == 15 / 25


def test_boundary_f_edge_cases():
    a, empty, full = square(10, 10), np.zeros((100, 100), bool), np.ones((100, 100), bool)
    assert metrics.boundary_f(a, a) == 1
    assert metrics.boundary_f(empty, empty) == 1
    assert metrics.boundary_f(a, empty) == metrics.boundary_f(empty, a) == 0
    assert metrics.boundary_f(full, a) == 0  # a full mask has no outline
    assert metrics.boundary_f(square(70, 70), a) == 0


def test_boundary_f_tolerance_is_a_fraction_of_the_diagonal():
    # ceil(0.008 * 141.4) = 2 pixels: a shift by 2 is free, one by 3 costs two of the four sides.
    a = square(10, 10)
    assert metrics.boundary_f(square(10, 12), a) == 1
    assert 0.4 < metrics.boundary_f(square(10, 13), a) < 0.75
    assert metrics.boundary_f(square(10, 13), a, bound=0.0175) == 1  # 3 pixels


def brute_boundary_f(predicted: np.ndarray, true: np.ndarray) -> float:
    """The definition, pixel by pixel."""

    def outline(mask):
        h, w = mask.shape
        return [
            (y, x)
            for y in range(h)
            for x in range(w)
            if any(
                mask[y, x] != mask[min(y + i, h - 1), min(x + j, w - 1)]
                for i, j in ((0, 1), (1, 0), (1, 1))
            )
        ]

    def share(a, b):
        near = [min((y - v) ** 2 + (x - u) ** 2 for v, u in b) <= radius**2 for y, x in a]
        return sum(near) / len(near)

    radius = np.ceil(0.008 * np.hypot(*true.shape))
    p, t = outline(predicted), outline(true)
    if not p or not t:
        return float(len(p) == len(t))
    precision, recall = share(p, t), share(t, p)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_boundary_f_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(8, 40)), int(rng.integers(8, 40))
    noise = cv2.GaussianBlur(rng.standard_normal((2, *shape)).transpose(1, 2, 0), (0, 0), 3.0)
    predicted, true = (noise[..., k] > np.quantile(noise[..., k], 0.6) for k in range(2))
    assert metrics.boundary_f(predicted, true) == brute_boundary_f(predicted, true)


def labels(*present: int) -> np.ndarray:
    """A label map with a square for each of the objects present."""
    out = np.zeros((100, 100), np.uint8)
    for k in present:
        out[square(30 * k - 20, 10)] = k
    return out


def masks(count: int, *present: int) -> np.ndarray:
    """The same squares as one mask per object."""
    return np.stack([labels(*present) == k + 1 for k in range(count)])


def test_clip_means_count_an_object_from_its_first_appearance():
    truth = [(), (1,), (1,), ()]
    predicted = [(), (), (1,), ()]
    frames = [
        metrics.score_frame(labels(*p), masks(2, *t)) for p, t in zip(predicted, truth, strict=True)
    ]
    j, f = metrics.clip_means(frames)
    # Object 1: frame 0 does not count, 1 is missed, 2 is right, 3 is rightly empty. 2 never shows.
    assert j[0] == f[0] == 2 / 3
    assert np.isnan(j[1]) and np.isnan(f[1])


def test_clip_means_a_false_alarm_counts():
    frames = [metrics.score_frame(labels(*p), masks(1, *t)) for p, t in [((1,), ()), ((1,), (1,))]]
    assert metrics.clip_means(frames)[0][0] == 0.5


def test_overall_is_the_mean_over_pairs_not_over_clips():
    rows = [("a", 1, 1.0), ("a", 2, 0.7), ("b", 1, 0.1)]
    results = metrics.Results(
        tuple(metrics.ObjectScores(c, k, j, j / 2, 0.25, 0.75) for c, k, j in rows)
    )
    assert results.j == pytest.approx(0.6)
    assert results.f == pytest.approx(0.3)
    assert results.jf == pytest.approx(0.45)
    assert results.static.jf == pytest.approx(0.5)
    assert results.clips["a"].j == pytest.approx(0.85)
    assert list(results.clips) == ["a", "b"]
    assert "J&F 0.450 (J 0.600, F 0.300)" in str(results) and "2 clips, 3 objects" in str(results)
