"""Reading whole sources: every number counted by hand, every fault found once."""

import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sam2_jax.data import sources, survey, tally
from sam2_jax.data.sources import SKIP, STOP, Video
from sam2_jax.data.survey import look, look_at
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.data.tally import Tally, as_json, duplicates, obstacle, rows
from sam2_jax.types import NAMED, UserError
from tests.data.arrays import Arrays

HEIGHT, WIDTH = 12, 20
FRAMES = 5


class Memory:
    """Clips in memory; `wrong` is what becomes of a frame: an error, or a picture."""

    name, notes = "memory", []

    def __init__(self, clips, wrong=None, listed=None):
        self.clips, self.wrong, self.listed = clips, wrong or {}, listed or {}

    def __len__(self):
        return len(self.clips)

    def video(self, index):
        return Video(f"clip{index}", len(self.clips[index][0]), HEIGHT, WIDTH)

    def objects(self, index, frame):
        masks = self.clips[index][1]
        seen = [k for k in sorted(masks) if masks[k][frame].any()]
        return tuple(sorted({*seen, *self.listed.get((index, frame), ())}))

    def read(self, index, frames, objects):
        pixels, masks = self.clips[index]
        bad = [self.wrong[index, t] for t in frames if (index, t) in self.wrong]
        for error in bad:
            if isinstance(error, Exception):
                raise error
        if bad and len(frames) > 1:
            raise ValueError("all input arrays must have the same shape")
        empty = np.zeros((HEIGHT, WIDTH), bool)
        chosen = [[masks[k][t] if k in masks else empty for k in objects] for t in frames]
        shape = (len(frames), len(objects), HEIGHT, WIDTH)
        images = bad[0][None] if bad else pixels[list(frames)]
        return images, np.array(chosen, bool).reshape(shape)


def clip(seed=0, ids=(1,), frames=FRAMES):
    """Noise; object number n is n + 1 pixels large, and absent on frame n."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)
    masks = {}
    for n, k in enumerate(ids):
        masks[k] = np.zeros((frames, HEIGHT, WIDTH), bool)
        masks[k][:, n, : n + 1] = True
        masks[k][n] = False
    return pixels, masks


def tallied(source):
    total = Tally()
    for _, found in look_at([source], [(0, i) for i in range(len(source))], 0):
        total.add(found)
    return total


def test_counts():
    total = tallied(Memory([clip(0, (3, 400, 7)), clip(1)]))
    assert (total.clips, total.frames) == (2, 10)
    # Clip 0: 2 objects on frames 0 to 2, 3 on frames 3 and 4; clip 1: none on frame 0, else 1.
    assert (total.a_frame.mean, total.a_frame.least, total.a_frame.most) == (1.6, 0, 3)
    assert (total.a_clip.mean, total.a_clip.least, total.a_clip.most) == (2, 1, 3)
    assert total.large_ids == 1 and total.bare == 1 and total.hollow == 0
    assert total.empty == pytest.approx(4 / 20)
    assert not total.unreadable.count and not total.mismatches.count


def test_an_object_that_is_listed_but_has_no_pixel():
    assert tallied(Memory([clip()], listed={(0, 2): (9,)})).hollow == 1


def test_areas_are_percentiles():
    rng = np.random.default_rng(0)
    areas = np.exp(rng.uniform(-12, 0, 5000))
    total = Tally()
    for part in np.split(areas, 10):
        none = np.zeros(0, np.uint64)
        total.add(survey.Clip(0, 1, [1], [1], part, 0, none, [], []))
    np.testing.assert_allclose(total.areas(), np.percentile(areas, tally.PERCENTILES), rtol=0.02)
    assert Tally().areas() == []
    whole = Tally()
    whole.add(survey.Clip(0, 1, [1], [1], np.ones(3), 0, none, [], []))
    np.testing.assert_allclose(whole.areas(), 1, rtol=0.002)


@pytest.mark.parametrize("budget", [1, 5 * HEIGHT * WIDTH, 1 << 20])
def test_pieces_of_any_size_give_the_same(monkeypatch, budget):
    source = Memory([clip(0, range(1, 8), 9)], listed={(0, 4): (99,)})
    whole = look(source, 0)
    monkeypatch.setattr(survey, "BUDGET", budget)
    piece = look(source, 0)
    assert sorted(piece.areas) == sorted(whole.areas) and len(whole.areas) == 7 * 8
    np.testing.assert_array_equal(piece.hashes, whole.hashes)
    assert piece._replace(areas=0, hashes=0) == whole._replace(areas=0, hashes=0)


def test_what_cannot_be_read_is_named_once_and_the_rest_is_read():
    broken = UserError("00002.jpg cannot be decoded")
    found = look(Memory([clip()], {(0, 2): broken}), 0)
    assert found.unreadable == ["00002.jpg cannot be decoded"]
    assert found.frames == FRAMES - 1 == len(found.hashes)
    assert not found.mismatches and len(found.areas) == FRAMES - 2


def test_a_mask_that_cannot_be_read_is_no_empty_one():
    class Masked(Memory):
        def objects(self, index, frame):
            if frame == 3:
                raise UserError("00003.png is cut short")
            return super().objects(index, frame)

    found = look(Masked([clip()], {(0, 3): UserError("00003.png is cut short")}), 0)
    assert found.unreadable == ["00003.png is cut short"]
    assert found.visible == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros((7, 9, 3), np.uint8), "clip clip0, frame 1: 9 x 7, expected 20 x 12"),
        (KeyError("frame"), "clip clip0, frame 1: KeyError: 'frame'"),
    ],
)
def test_contradictions_of_a_source(wrong, text):
    found = look(Memory([clip()], {(0, 1): wrong}), 0)
    assert found.mismatches == [text] and not found.unreadable


def test_faults_are_kept_up_to_a_number():
    many = Memory([clip()] * 30, {(i, 0): UserError(f"file {i}") for i in range(30)})
    total = tallied(many)
    assert total.unreadable.count == total.broken == 30
    assert total.unreadable.first == [f"file {i}" for i in range(tally.TOLD)]
    assert ("unreadable", "and 10 more") in rows(total, 30)


def test_duplicates_within_and_between_sources():
    same, other, third = clip(0), clip(1), clip(2)
    mixed = (np.concatenate([other[0][:2], same[0][2:]]), same[1])
    first = tallied(Memory([same, other, mixed]))
    second = tallied(Memory([third, same]))
    assert [tuple(pair) for pair in duplicates([first, second])] == [
        ((0, 0), (1, 1), 5),
        ((0, 0), (0, 2), 3),
        ((0, 1), (0, 2), 2),
    ]
    assert duplicates([tallied(Memory([third])), tallied(Memory([other]))]) == []


def test_frames_of_one_colour_are_no_duplicates():
    black = (np.zeros_like(clip()[0]), clip()[1])
    assert duplicates([tallied(Memory([black, black]))]) == []
    dot = (np.zeros_like(clip()[0]), clip()[1])
    dot[0][0, 3, 3] = 1
    assert [pair.frames for pair in duplicates([tallied(Memory([dot, dot]))])] == [1]
    turned = np.ascontiguousarray(dot[0][0].reshape(WIDTH, HEIGHT, 3))
    assert survey.frame_hash(turned) != survey.frame_hash(dot[0][0])


def test_processes_and_threads_give_the_same_in_order():
    source = SyntheticSource(num_clips=6, num_frames=3, size=32)
    jobs = [(number, i) for number in (0, 1) for i in range(6)]
    results = [list(look_at([source, source], jobs, workers)) for workers in (0, 2)]
    totals = []
    for result in results:
        assert [(number, found.index) for number, found in result] == jobs
        total = Tally()
        for _, found in result:
            total.add(found)
        totals.append(as_json(total))
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    ("bad", "on_error", "max_bad", "stops"),
    [
        (0, STOP, 0.0, False),
        (1, STOP, 0.5, True),
        (1, SKIP, 0.1, False),
        (2, SKIP, 0.1, True),
        (0, SKIP, 0.0, False),
    ],
)
def test_the_policy_decides(bad, on_error, max_bad, stops):
    total = tallied(Memory([clip()] * 10, {(i, 0): UserError(f"file {i}") for i in range(bad)}))
    text = obstacle(total, on_error, max_bad)
    assert ("file 0" in text) == stops and bool(text) == stops


def test_a_mismatch_stops_whatever_the_policy():
    total = tallied(Memory([clip()] * 10, {(0, 1): np.zeros((7, 9, 3), np.uint8)}))
    assert "expected 20 x 12" in obstacle(total, SKIP, 1.0)


def test_a_source_without_objects():
    nothing = (clip()[0], {})
    total = tallied(Memory([nothing]))
    assert total.bare == total.frames == FRAMES and total.empty == 0
    assert "mask area" not in dict(rows(total, 1))
    assert not math.isnan(total.a_clip.mean)


def test_jobs_are_handed_out_in_blocks():
    """A pool that is given all jobs at once keeps a record of each."""
    given = []

    class Pool(ThreadPoolExecutor):
        def map(self, fn, *iterables, **options):
            given.append(len(iterables[0]))
            return super().map(fn, *iterables, **options)

    with Pool(2) as pool:
        found = list(sources.in_blocks(pool, abs, range(-2 * sources.BLOCK - 1, 0)))
    assert found == list(range(2 * sources.BLOCK + 1, 0, -1)) and max(given) == sources.BLOCK


def test_many_clips_left_out_are_counted_and_few_named():
    bare = Arrays([[{1: np.ones((2, 2), bool)}]] + [[{}]] * 9000)
    usable = sources.keep_usable(bare, 1)
    assert len(usable) == 1 and len(pickle.dumps(usable.notes)) < 1000
    assert "9000 of 9001 clips left out" in usable.notes[-1]
    assert usable.notes[-1].endswith(f"and {9000 - NAMED} more")
