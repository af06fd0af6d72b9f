"""Evaluation with trackers whose score is known: perfect, static, shifted, silent."""

import collections
from typing import Any

import numpy as np
import pytest

from sam2_jax import evaluate
from sam2_jax.data import transforms
from sam2_jax.data.sources import Video
from sam2_jax.predict import video
from sam2_jax.types import UserError

SIZE, RESOLUTION = (96, 128), 64


class Squares:
    """Clips of moving squares, ids 2 and 5, red and green on black."""

    name = "squares"

    def __init__(self, clips: int = 2, num_frames: int = 11, empty_start: int = 0):
        self.clips, self.num_frames, self.empty_start = clips, num_frames, empty_start
        self.longest_read = 0
        self.notes: list[str] = []

    def __len__(self):
        return self.clips

    def video(self, index):
        return Video(f"clip{index}", self.num_frames, *SIZE)

    def labels(self, frame):
        label = np.zeros(SIZE, np.uint8)
        if frame >= self.empty_start:
            label[8 + 2 * frame : 40 + 2 * frame, 16:48] = 2
            label[32:64, 64 + 2 * frame : 96 + 2 * frame] = 5
        return label

    def objects(self, index, frame):
        return tuple(int(k) for k in np.unique(self.labels(frame)) if k)

    def read(self, index, frames, objects):
        self.longest_read = max(self.longest_read, len(frames))
        labels = np.stack([self.labels(t) for t in frames])
        masks = np.stack([labels == k for k in objects], 1)
        return 255 * np.stack([labels == i for i in (2, 5, 255)], -1).astype(np.uint8), masks


class FakeTracker:
    """Speaks a tracker's protocol; `predict(t, first, truth)` chooses the masks of frame t."""

    def __init__(self, predict, ids=(2, 5)):
        self.predict, self.ids = predict, ids
        self.calls, self.num_objects = collections.Counter(), set()

    def tracker(self):
        return video.Tracker(self.first, self.first, self.first, self.next)

    def _logits(self, t, first, image):
        truth = np.zeros_like(first)
        for k in range(len(self.ids)):
            truth[k] = image[..., k] > 127
        masks = self.predict(t, first, truth)
        low = masks.reshape(len(first), RESOLUTION // 4, 4, RESOLUTION // 4, 4).mean((2, 4)) - 0.5
        low[len(self.ids) :] = 9.0  # padding shouts: it must not be heard
        return low.astype(np.float32)

    def first(self, params, image, masks, num_frames) -> Any:
        self.params = params
        assert image.shape == (RESOLUTION, RESOLUTION, 3)
        assert image.dtype == np.uint8 and masks.dtype == bool
        assert masks.shape[1:] == (RESOLUTION, RESOLUTION)
        self.calls[num_frames] += 1
        self.num_objects.add(len(masks))
        return (1, masks), self._logits(0, masks, image)

    def next(self, params, state, image) -> Any:
        t, first = state
        return (t + 1, first), self._logits(t, first, image)


def run(predict, source=None, **kwargs):
    tracker = FakeTracker(predict)
    source = source or Squares()
    run_clip = evaluate.tracker_predictor(tracker.tracker(), "params", RESOLUTION)
    return evaluate.evaluate(run_clip, source, **kwargs), tracker


def exact(ids=(2, 5), source=None):
    """A predictor that skips the tracker: the truth at full resolution."""
    source = source or Squares()

    def predict(frames, masks, num_frames) -> Any:
        for t, _ in enumerate(frames):
            truth = source.labels(t)
            yield sum((np.uint8(k + 1) * (truth == i) for k, i in enumerate(ids)), np.uint8(0))

    return predict


def static(frames, masks, num_frames):
    for _ in frames:
        yield (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0).astype(np.uint8)


def test_truth_scores_one():
    results = evaluate.evaluate(exact(), Squares())
    assert results.j == results.f == results.jf == 1
    assert [(o.clip, o.object_id) for o in results.objects] == [
        ("clip0", 2), ("clip0", 5), ("clip1", 2), ("clip1", 5)
    ]  # fmt: skip


def test_truth_through_a_tracker_scores_nearly_one():
    results, tracker = run(lambda t, first, truth: truth)
    assert results.jf > 0.93  # logits are 16 x 16: corners of the squares are rounded
    assert tracker.calls == {11: 2}


def test_static_tracker_is_the_static_baseline():
    results = evaluate.evaluate(static, Squares())
    assert results.jf == results.static.jf
    # By hand: at frame t the squares of 32 overlap over 32 - 2 t rows (columns); frames 1 to 9.
    expected = np.mean([(32 - 2 * t) / (32 + 2 * t) for t in range(1, 10)])
    assert results.j == pytest.approx(expected)
    assert results.static.j == pytest.approx(expected)


def test_first_and_last_frame_are_not_scored():
    def wrong_at_the_ends(t, first, truth):
        return truth if 0 < t < 10 else np.zeros_like(truth)

    right, _ = run(lambda t, first, truth: truth)
    assert run(wrong_at_the_ends)[0] == right
    wrong_once, _ = run(lambda t, first, truth: truth if t != 9 else np.zeros_like(truth))
    assert wrong_once.j == pytest.approx(right.j * 8 / 9, abs=0.01)


def test_order_of_results_for_worse_trackers():
    good = run(lambda t, first, truth: truth)[0]
    shifted = run(lambda t, first, truth: np.roll(truth, 8, axis=2))[0]
    silent = run(lambda t, first, truth: np.zeros_like(truth))[0]
    swapped = run(lambda t, first, truth: truth[[1, 0]])[0]
    assert silent.j == swapped.j == 0
    assert 0.25 < shifted.j < 0.4 < good.j  # by 16 of 32 columns: about one third
    # The baseline does not depend on the model.
    assert good.static == silent.static == shifted.static


def test_limits_and_bounded_reads():
    source = Squares(clips=3, num_frames=20)
    views = []
    evaluate.evaluate(exact(), source, max_clips=2, max_frames=5, watch=views.append)
    assert [v.frame for v in views] == 2 * [0, 1, 2, 3, 4]
    assert {v.clip for v in views} == {"clip0", "clip1"}
    assert {v.ids for v in views} == {(2, 5)} and {v.num_frames for v in views} == {5}
    assert all((v.predicted == k + 1)[v.true[k]].all() for v in views for k in range(2))
    evaluate.evaluate(exact(), source)
    assert source.longest_read <= evaluate.CHUNK


def test_starts_at_the_first_annotated_frame():
    source, views = Squares(empty_start=3), []
    results, tracker = run(lambda t, first, truth: truth, source, watch=views.append, max_clips=1)
    assert tracker.calls == {8: 1} and results.j > 0.9
    assert [(v.frame, v.place) for v in views] == [(t + 3, t) for t in range(8)]


def test_overlapping_masks_are_scored_as_they_are():
    class Twins(Squares):
        def read(self, index, frames, objects):
            images, masks = super().read(index, frames, objects)
            return images, masks[:, [0, 0]]  # both objects are in the same place

    results = evaluate.evaluate(static, Twins(), max_clips=1)
    assert results.static.objects[0].j > 0.5 and results.static.objects[1].j == 0


def test_more_objects_than_a_palette_has():
    logits = np.where(np.arange(300)[:, None, None] == 299, 1.0, -1.0) * np.ones((300, 4, 4))
    assert (evaluate.label_map(logits.astype(np.float32), (4, 4)) == 300).all()


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match="no object to score"):
        run(lambda t, first, truth: truth, Squares(empty_start=99))
    with pytest.raises(UserError, match="3 annotated frames"):
        run(lambda t, first, truth: truth, max_frames=2)


def test_clips_too_short_to_score_are_found_before_training():
    evaluate.check_source(Squares(num_frames=3), max_clips=1)
    with pytest.raises(UserError, match="longest of 2 evaluation clips has 2 frames"):
        evaluate.check_source(Squares(num_frames=2))


def test_label_map_is_the_highest_positive_logit():
    logits = np.array([[[3.0]], [[5.0]], [[5.0]], [[-1.0]]], np.float32)
    assert (evaluate.label_map(logits, (2, 3)) == 2).all()
    assert (evaluate.label_map(logits - 6, (2, 3)) == 0).all()
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 7, 9)).astype(np.float32)
    got = evaluate.label_map(logits, (7, 9))  # the same size: no interpolation
    assert (got == np.where(logits.max(0) > 0, logits.argmax(0) + 1, 0)).all()


def test_label_map_upsamples_like_the_reference():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).standard_normal((2, 16, 16)).astype(np.float32)
    high = torch.nn.functional.interpolate(
        torch.tensor(logits)[None], size=(48, 85), mode="bilinear", align_corners=False
    )[0].numpy()
    want = np.where(high.max(0) > 0, high.argmax(0) + 1, 0)
    # A pixel exactly on an edge between two labels may fall either way.
    assert (evaluate.label_map(logits, (48, 85)) != want).mean() < 1e-3


def test_objects_are_padded_to_few_sizes():
    sizes = [evaluate._padded(n) for n in range(1, 26)]
    assert all(s >= n for n, s in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def test_padding_is_not_heard(monkeypatch):
    plain, tracker = run(lambda t, first, truth: truth)
    assert tracker.num_objects == {2}
    monkeypatch.setattr(evaluate, "_padded", lambda n: 6)
    padded, tracker = run(lambda t, first, truth: truth)
    assert tracker.num_objects == {6} and padded == plain


def test_prompts_are_given_as_named():
    given, told = {}, []

    def note(kind):
        def first(params, image, masks, *rest, **options) -> Any:
            given[kind] = (masks, *rest, options)
            found = tracker.first(params, image, squares, rest[-1])
            if kind != "click":
                return found
            points = np.full((len(masks), 3, 2), 15.5, np.float32)
            return *found, points, np.tile([1, 0, -1], (len(masks), 1))

        return first

    source = Squares(clips=1, num_frames=4)
    squares = transforms.resize_masks(source.read(0, [0], (2, 5))[1][0], RESOLUTION)
    tracker = FakeTracker(lambda t, first, truth: truth)
    kinds = video.Tracker(note("mask"), note("box"), note("click"), tracker.next)
    for prompt in ("mask", "box", "click3"):
        predict = evaluate.tracker_predictor(kinds, None, RESOLUTION, prompt, told.append)
        assert evaluate.evaluate(predict, source).jf > 0.9
    assert [each.prompt for each in told] == ["mask", "box", "click3"]
    assert told[0].points.shape == (2, 0, 2) and told[2].points[0, 0].tolist() == [0.25, 0.25]
    assert told[2].labels.tolist() == [[1, 0, -1]] * 2
    np.testing.assert_array_equal(given["mask"][0], squares)
    np.testing.assert_array_equal(given["click"][0], squares)
    assert given["click"][2] == {"clicks": 3}
    points, labels = given["box"][:2]
    y, x = np.nonzero(squares[1])
    assert points[1].tolist() == [[x.min(), y.min()], [x.max(), y.max()]]
    assert labels.tolist() == [[2, 3], [2, 3]]


def test_an_absent_object_has_no_box():
    points, labels = evaluate.boxes(np.zeros((1, 8, 8), bool))
    assert labels.tolist() == [[-1, -1]] and np.isfinite(points).all()


@pytest.mark.parametrize("prompt", ["click", "click0", "boxes", "masks3"])
def test_unknown_prompts_are_named(prompt):
    with pytest.raises(UserError, match=f"eval.prompts: {prompt!r} is no prompt"):
        evaluate.parse_prompt(prompt)


def test_several_predictors_share_the_clips_and_keep_their_order():
    tracked = []

    def predictor(number):
        def predict(frames, masks, num_frames) -> Any:
            tracked.append(number)
            yield from static(frames, masks, num_frames)

        return predict

    source = Squares(clips=8, num_frames=4)
    found = evaluate.score_clips([predictor(0), predictor(1)], source, range(8))
    assert [row.clip for row in found] == [f"clip{i}" for i in range(8) for _ in range(2)]
    assert found == list(evaluate.evaluate(static, source).objects)
    assert sorted(set(tracked)) == [0, 1]
