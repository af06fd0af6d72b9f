"""Rendered clips: pure functions of seed and index that move as they should."""

import numpy as np
import pytest

from sam2_jax.data.sources import describe
from sam2_jax.data.synthetic import SyntheticSource, make_clip
from sam2_jax.data.textures import FIELDS, ramp


def source(**changes):
    return SyntheticSource(
        **({"num_clips": 30, "num_frames": 16, "size": 64, "max_objects": 3, "seed": 3} | changes)
    )


def labels_of(index, frames, **changes) -> np.ndarray:
    """Label maps of all objects, which never overlap."""
    clip = source(**changes)
    masks = clip.read(index, frames, (1, 2, 3))[1]
    assert (masks.sum(1) <= 1).all()
    return np.einsum("tohw,o->thw", masks.astype(np.uint8), np.arange(1, 4, dtype=np.uint8))


def overlap(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def test_deterministic_and_random_access():
    frames, masks = source().read(4, range(5), (1, 2))
    make_clip.cache_clear()
    again, again_masks = source().read(4, [3, 1], (2,))
    np.testing.assert_array_equal(again, frames[[3, 1]])
    np.testing.assert_array_equal(again_masks, masks[[3, 1], 1:])


def test_objects_are_those_with_a_mask():
    for index in range(10):
        masks = np.any(source().read(index, range(16), (1, 2, 3))[1], axis=(2, 3))
        for t in range(16):
            assert source().objects(index, t) == tuple(np.flatnonzero(masks[t]) + 1)


def test_no_two_clips_alike_over_indices_seeds_and_streams():
    sources = [source(seed=s, stream=k) for s in (0, 1) for k in (0, 1)]
    clips = [rendered.read(i, [0], ()) for rendered in sources for i in (0, 1)]
    for a in range(len(clips)):
        for b in range(a):
            assert (clips[a][0] != clips[b][0]).mean() > 0.5


def test_every_object_is_there_on_the_first_frame_and_labels_are_dense():
    numbers = set()
    for index in range(30):
        labels = labels_of(index, range(16))
        first = set(np.unique(labels[0])) - {0}
        assert first == set(range(1, len(first) + 1)) and first
        assert set(np.unique(labels)) - {0} == first
        numbers.add(len(first))
    assert numbers == {1, 2, 3}


def test_objects_move_away_but_can_be_followed():
    standing, following = [], []
    for index in range(30):
        labels = labels_of(index, range(16))
        for label in range(1, labels[0].max() + 1):
            masks = labels == label
            standing += [overlap(masks[0], mask) for mask in masks[1:]]
            following += [
                overlap(a, b) for a, b in zip(masks, masks[1:], strict=False) if (a | b).any()
            ]
    assert 0.25 < np.mean(standing) < 0.45
    assert 0.7 < np.mean(following) < 0.9


def test_some_objects_leave_and_return():
    returned = 0
    for index in range(30):
        labels = labels_of(index, range(16))
        for label in range(1, labels[0].max() + 1):
            seen = (labels == label).any((1, 2))
            returned += bool((~seen).any() and seen[np.argmin(seen) :].any())
    assert returned >= 2


def test_objects_differ_from_their_background():
    differences = []
    for index in range(30):
        frames, labels = source().read(index, [0], ())[0], labels_of(index, [0])
        inside, outside = frames[0][labels[0] > 0], frames[0][labels[0] == 0]
        differences.append(np.abs(inside.mean(0) - outside.mean(0)).max())
    assert np.mean(np.array(differences) > 15) > 0.9  # levels of 255, grain has 4


def test_same_scene_at_every_resolution():
    small, large = labels_of(2, [0, 9]), labels_of(2, [0, 9], size=128)
    assert (small == large[:, ::2, ::2]).mean() > 0.97  # but for pixels on an edge


def test_speed_scales_motion():
    still, labels = labels_of(0, [0, 15], speed=1e-6)
    assert (still == labels).all()


def test_video_and_description():
    assert source().video(7) == ("synthetic-00007", 16, 64, 64)
    assert dict(describe(source()))["frames"] == "480 (16 a clip)"
    with pytest.raises(IndexError):
        source().video(30)


@pytest.mark.parametrize("field", FIELDS)
def test_fields_are_in_range_and_not_flat(field):
    values = field(np.random.default_rng(0), 48)
    assert values.shape == (48, 48) and values.dtype == np.float32
    assert values.min() >= 0 and values.max() <= 1 and values.std() > 0.05


def test_ramp_passes_through_its_colours():
    colours = ramp([(0.0, 1.0, 1.0), (1 / 3, 1.0, 1.0)])
    np.testing.assert_array_equal(colours[[0, 255]], [[255, 0, 0], [0, 255, 0]])
