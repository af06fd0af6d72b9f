"""The draw of dropout: its share, its independence, and that a part of it is that part."""

import jax
import numpy as np
import pytest

from sam2_jax.model import draws

ROWS, COLUMNS = 600, 500


def draw_of(seed, rate, n=1, heads=1):
    draw = draws.make_draw(jax.random.key(seed), n, heads, ROWS, COLUMNS)
    return draw, np.asarray(draws.kept(draw, rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_kept_has_mean_and_variance_of_coins(rate):
    kept = draw_of(0, rate, 2, 3)[1]
    p = draws.probability(rate)
    assert p == pytest.approx(1 - rate, abs=1e-9)
    coin = np.sqrt(p * (1 - p))
    assert abs(kept.mean() - p) < 4 * coin / np.sqrt(kept.size)
    for axis, length in ((-1, COLUMNS), (-2, ROWS)):
        shares = kept.mean(axis).ravel()
        spread = coin / np.sqrt(length)
        # The standard deviation of m shares is known to one part in sqrt(2 m)
        assert shares.std() == pytest.approx(spread, rel=4 / np.sqrt(2 * shares.size))


def test_weights_are_dropped_independently():
    kept = draw_of(1, 0.5)[1][0, 0] * 2.0 - 1.0
    bound = 5 / np.sqrt(kept.size)
    for rows, columns in ((0, 1), (1, 0), (1, 1), (2, 3), (0, 64), (64, 0)):
        a, b = kept[rows:, columns:], kept[: ROWS - rows, : COLUMNS - columns]
        assert abs((a * b).mean()) < bound
    # Of the four corners of a rectangle three must not tell the fourth
    corners = kept[1:, 1:] * kept[:-1, 1:] * kept[1:, :-1] * kept[:-1, :-1]
    assert abs(corners.mean()) < bound
    # No two queries share their draw, nor two keys
    for axis in (0, 1):
        other = np.corrcoef(kept, rowvar=axis == 0)
        np.fill_diagonal(other, 0.0)
        assert np.abs(other).max() < 6 / np.sqrt(kept.shape[1 - axis])


def test_objects_heads_and_keys_of_the_generator_differ():
    kept = draw_of(0, 0.5, 2, 2)[1].reshape(4, -1)
    assert (kept != draw_of(1, 0.5, 2, 2)[1].reshape(4, -1)).mean() == pytest.approx(0.5, abs=0.01)
    for i in range(4):
        for j in range(i):
            assert (kept[i] != kept[j]).mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(kept, draw_of(0, 0.5, 2, 2)[1].reshape(4, -1))


def test_a_part_of_the_draw_is_that_part():
    draw, kept = draw_of(3, 0.2)
    part = draws.Draw(draw.rows[..., 100:200], draw.columns[..., 7:9])
    np.testing.assert_array_equal(draws.kept(part, 0.2), kept[..., 100:200, 7:9])


def test_nothing_and_everything():
    assert draw_of(0, 0.0)[1].all()
    assert not draw_of(0, 1.0)[1].any()
