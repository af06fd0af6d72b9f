"""Sampling of frames and objects."""

import collections

import numpy as np
import pytest

from sam2_jax.data.sampling import Sampling, sample_clip


def draw(seed, visible, num_frames=2, max_objects=2, **settings):
    rng = np.random.default_rng(seed)
    sampling = Sampling(num_frames, max_objects, **settings)
    return sample_clip(rng, visible.__getitem__, len(visible), sampling)


def test_frames_are_consecutive_and_starts_uniform_over_those_with_an_object():
    visible = [[], [1], [], [1, 3], [2], [1]]
    starts = collections.Counter()
    for seed in range(600):
        frames, objects = draw(seed, visible)
        assert frames == [frames[0], frames[0] + 1]
        assert set(objects) == set(visible[frames[0]])
        starts[frames[0]] += 1
    assert set(starts) == {1, 3, 4}
    assert min(starts.values()) > 150  # 200 expected, standard deviation 12


def test_objects_are_a_random_choice_of_at_most_max_objects():
    seen = collections.Counter(
        tuple(sorted(draw(seed, [[1, 2, 700]] * 3).objects)) for seed in range(300)
    )
    assert set(seen) == {(1, 2), (1, 700), (2, 700)} and min(seen.values()) > 60


def test_reversed_clips_choose_objects_on_the_frame_shown_first():
    frames, objects = draw(0, [[1], [2]], reverse=1.0)
    assert frames == [1, 0] and objects == [2]
    assert any(draw(s, [[1]] * 2, reverse=0.5).frames == [1, 0] for s in range(20))
    assert any(draw(s, [[1]] * 2, reverse=0.5).frames == [0, 1] for s in range(20))


def test_plays_in_the_other_direction_only_where_nothing_else_shows_an_object():
    assert draw(0, [[1], [], []], reverse=1.0) == ([0, 1], [1])
    with pytest.raises(ValueError):
        draw(0, [[], [], [1]], reverse=0.0)  # never asked to play backwards


def test_strides_are_drawn_uniformly_and_fit_the_clip():
    strides = collections.Counter()
    for seed in range(600):
        frames, _ = draw(seed, [[1]] * 9, 3, min_stride=2, max_stride=7)
        assert len({b - a for a, b in zip(frames, frames[1:], strict=False)}) == 1
        assert 0 <= frames[0] and frames[-1] <= 8
        strides[frames[1] - frames[0]] += 1
    assert set(strides) == {2, 3, 4} and min(strides.values()) > 150
    assert draw(1, [[1]] * 3, 3, max_stride=4).frames == [0, 1, 2]  # too short for more


def test_a_stride_that_shows_nothing_gives_way_to_one_that_does():
    visible = [[], [], [1], [], []]
    drawn = {tuple(draw(seed, visible, 3, max_stride=2).frames) for seed in range(20)}
    assert drawn == {(2, 3, 4)}


def test_objects_that_appear_later():
    visible = [[1, 2], [1, 3], [4]]
    assert set(draw(0, visible, 3, 9).objects) == {1, 2}
    drawn = [draw(seed, visible, 3, 2, later_objects=1.0).objects for seed in range(200)]
    assert all(len(set(objects)) == 2 and objects[0] in (1, 2) for objects in drawn)
    assert {k for objects in drawn for k in objects} == {1, 2, 3, 4}
    some = [draw(seed, visible, 3, 9, later_objects=0.5).objects for seed in range(200)]
    assert 60 < sum(len(objects) == 4 for objects in some) < 140


def test_one_frame_is_an_image():
    assert draw(0, [[5]], 1, max_stride=3) == ([0], [5])


def test_same_seed_same_sample():
    assert draw(5, [[1, 2, 3]] * 9) == draw(5, [[1, 2, 3]] * 9)


@pytest.mark.parametrize("visible, num_frames", [([[], []], 2), ([[1]], 2)])
def test_no_object_or_too_short(visible, num_frames):
    with pytest.raises(ValueError):
        draw(0, visible, num_frames)


@pytest.mark.parametrize("reverse", [0.5, 0.2])
def test_directions_are_drawn_as_by_redrawing_start_and_direction(reverse):
    """Of four pairs, one shows nothing at first: the others keep their weights."""
    expected = {(0, 1): 1 - reverse, (1, 2): 1 - reverse, (1, 0): reverse}
    count, total = 4000, sum(expected.values())
    drawn = collections.Counter(
        tuple(draw(seed, [[1], [1], []], reverse=reverse).frames) for seed in range(count)
    )
    assert set(drawn) == set(expected)
    for frames, weight in expected.items():
        share = weight / total
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(drawn[frames] / count - share) < 4 * spread
