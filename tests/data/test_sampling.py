"""Sampling of frames and objects."""

import collections

import numpy as np
import pytest

from sam2_jax.data.sampling import sample_clip, visible_objects


def label_maps(visible):
    """One 1 x 4 label map per frame that shows the given objects."""
    return [np.array([[*v, *[0] * (4 - len(v))]], np.uint8) for v in visible]


def draw(seed, visible, num_frames=2, max_objects=2, reverse=0.0):
    maps = label_maps(visible)
    rng = np.random.default_rng(seed)
    return sample_clip(rng, maps.__getitem__, len(maps), num_frames, max_objects, reverse)


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
        tuple(sorted(draw(seed, [[1, 2, 7]] * 3).objects)) for seed in range(300)
    )
    assert set(seen) == {(1, 2), (1, 7), (2, 7)} and min(seen.values()) > 60


def test_reversed_clips_choose_objects_on_the_frame_shown_first():
    frames, objects = draw(0, [[1], [2]], reverse=1.0)
    assert frames == [1, 0] and objects == [2]
    assert any(draw(s, [[1]] * 2, reverse=0.5).frames == [1, 0] for s in range(20))
    assert any(draw(s, [[1]] * 2, reverse=0.5).frames == [0, 1] for s in range(20))


def test_plays_in_the_other_direction_only_where_nothing_else_shows_an_object():
    assert draw(0, [[1], [], []], reverse=1.0) == ([0, 1], [1])


def test_same_seed_same_sample():
    assert draw(5, [[1, 2, 3]] * 9) == draw(5, [[1, 2, 3]] * 9)


@pytest.mark.parametrize("visible, num_frames", [([[], []], 2), ([[1]], 2)])
def test_no_object_or_too_short(visible, num_frames):
    with pytest.raises(ValueError):
        draw(0, visible, num_frames)


def test_visible_objects():
    labels = np.array([[0, 255, 3], [3, 0, 0]], np.uint8)
    np.testing.assert_array_equal(visible_objects(labels), [3, 255])
    assert not len(visible_objects(np.zeros((2, 2), np.uint8)))
