"""Prompt sampling against the reference's: the same distributions, centre clicks exactly.

Every comparison is a two-sample test that calls equal distributions different with probability
`FALSE_ALARM` (see tolerances.py).
"""
# pyright: reportMissingImports=false

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import training.model.sam2
from sam2.modeling.sam2_utils import get_next_point, sample_box_points
from scipy import stats
from training.model.sam2 import SAM2Train

from sam2_jax import prompts
from tests.parity.tolerances import FALSE_ALARM

DRAWS = 4000


def same_counts(ours: Counter, theirs: Counter) -> None:
    """Chi-square test of homogeneity; what is rare is taken together."""
    names = ours.keys() | theirs.keys()
    common = [name for name in names if ours[name] + theirs[name] >= 20]
    rows = [[counts[name] for name in common] for counts in (ours, theirs)]
    rest = [
        sum(counts.values()) - sum(row) for counts, row in zip((ours, theirs), rows, strict=True)
    ]
    if sum(rest) >= 20:
        rows = [[*row, left] for row, left in zip(rows, rest, strict=True)]
    found: Any = stats.chi2_contingency(rows)  # scipy has no types
    assert found.pvalue > FALSE_ALARM, (ours, theirs)


def reference_plans(seed: int, frames: int) -> Counter:
    """What the reference's own prepare_prompt_inputs draws with its released settings."""
    model: Any = SimpleNamespace(
        training=True,
        prob_to_use_pt_input_for_train=0.5,
        prob_to_use_box_input_for_train=0.5,
        num_frames_to_correct_for_train=2,
        rand_frames_to_correct_for_train=True,
        num_init_cond_frames_for_train=2,
        rand_init_cond_frames_for_train=True,
        rng=np.random.default_rng(seed),
    )
    masks = torch.zeros(frames, 1, 4, 4, dtype=torch.bool)
    masks[..., 1:3, 1:3] = True
    clip: Any = SimpleNamespace(masks=masks, num_frames=frames)
    drawn = Counter()
    for _ in range(DRAWS):
        out = SAM2Train.prepare_prompt_inputs(model, {}, clip)
        labels = {t: p["point_labels"] for t, p in out["point_inputs_per_frame"].items()}
        boxes = [t for t, label in labels.items() if label.shape[1] == 2]
        frames_of = (out["init_cond_frames"], boxes, out["frames_to_add_correction_pt"])
        drawn[out["use_pt_input"], *(tuple(sorted(f)) for f in frames_of)] += 1
    return drawn


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_plans(seed, frames):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    sample = jax.vmap(lambda key: prompts.sample_plan(key, frames, prompts.PromptSettings()))
    plans = jax.device_get(jax.jit(sample)(keys))
    marks = (plans.is_cond, plans.is_box, plans.is_corrected)
    ours = Counter(
        (bool(plans.use_points[i]), *(tuple(np.flatnonzero(x[i]).tolist()) for x in marks))
        for i in range(DRAWS)
    )
    same_counts(ours, reference_plans(seed, frames))


def reference_from_truth(seed: int) -> Counter:
    """Which clicks of a corrected frame the reference draws from the truth alone."""
    drawn: list[bool] = []

    def next_point(gt_masks, pred_masks, method):
        drawn.append(pred_masks is None)
        return torch.zeros(1, 1, 2), torch.zeros(1, 1)

    masks = torch.zeros(1, 1, 2, 2)
    model: Any = SimpleNamespace(
        training=True,
        prob_to_sample_from_gt_for_train=0.1,
        num_correction_pt_per_frame=7,
        rng=np.random.default_rng(seed),
        use_act_ckpt_iterative_pt_sampling=False,
        _use_multimask=lambda *_: False,
        _forward_sam_heads=lambda **_: [masks] * 7,
    )
    with mock.patch.object(training.model.sam2, "get_next_point", next_point):
        for _ in range(DRAWS):
            rest = [masks, [masks], masks, *[masks] * 6, {}]
            SAM2Train._iter_correct_pt_sampling(model, True, None, *rest)
    return Counter(map(tuple, np.reshape(drawn, (DRAWS, 7)).tolist()))


def test_clicks_from_the_truth(seed):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    sample = jax.vmap(lambda key: prompts.sample_plan(key, 1, prompts.PromptSettings()).from_truth)
    ours = Counter(map(tuple, np.asarray(jax.jit(sample)(keys))[:, 0].tolist()))
    same_counts(ours, reference_from_truth(seed))


def regions(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    truth, guess = np.zeros((2, 6, 7), bool)
    truth[1:4, 2:6] = True
    guess[2:6, 1:4] = True
    empty, full = np.zeros((6, 7), bool), np.ones((6, 7), bool)
    return {
        "first click": (truth, None),
        "both kinds of error": (truth, guess),
        "nothing wrong": (truth, truth),
        "nothing there": (empty, None),
        "nothing there, something found": (empty, guess),
        "everywhere, nothing wrong": (full, full),
    }[name]


CLICKS = (
    "first click",
    "both kinds of error",
    "nothing wrong",
    "nothing there",
    "nothing there, something found",
    "everywhere, nothing wrong",
)


@pytest.mark.parametrize("case", CLICKS)
def test_clicks(seed, case):
    truth, guess = regions(case)

    def many(x) -> Any:
        return None if x is None else np.broadcast_to(x, (DRAWS, 1, *x.shape))

    points, labels = prompts.uniform_click(jax.random.key(seed), many(truth), many(guess))
    torch.manual_seed(seed)
    tensors = [None if x is None else torch.tensor(x.copy()) for x in (many(truth), many(guess))]
    theirs, their_labels = get_next_point(*tensors, method="uniform")

    def count(points, labels) -> Counter:
        points, labels = np.asarray(points).reshape(-1, 2), np.asarray(labels).reshape(-1)
        return Counter((int(x), int(y), int(k)) for (x, y), k in zip(points, labels, strict=True))

    ours, reference = count(points, labels), count(theirs, their_labels)
    assert ours.keys() == reference.keys()
    if len(ours) > 1:
        same_counts(ours, reference)


def test_boxes(seed):
    """Of a small object, where noise is a share of its side, and of one larger than its bound."""
    for height, width, top, left in ((20, 31, 40, 7), (215, 250, 3, 30)):
        truth = np.zeros((240, 310), bool)
        truth[top : top + height, left : left + width] = True
        rounds, draws = 8, DRAWS // 8  # of all at once the masks would take much memory
        masks = np.broadcast_to(truth, (draws, 1, *truth.shape))
        tensors = torch.tensor(masks[:1].copy()).expand(draws, 1, -1, -1)
        torch.manual_seed(seed)
        found, expected = [], []
        for key in jax.random.split(jax.random.key(seed), rounds):
            ours, labels = prompts.noisy_box(key, masks)
            theirs, their_labels = sample_box_points(tensors)
            np.testing.assert_array_equal(labels[:, 0], their_labels)
            found.append(np.asarray(ours).reshape(draws, 4))
            expected.append(theirs.numpy().reshape(draws, 4))
        same_boxes(np.concatenate(found), np.concatenate(expected))


def same_boxes(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Each side alike, its ends too, and, as there, none a function of another."""
    for side in range(4):
        alike: Any = stats.ks_2samp(ours[:, side], theirs[:, side])
        assert alike.pvalue > FALSE_ALARM
        # The largest of n uniform numbers is further from the end than this share of the range
        # with probability FALSE_ALARM: sees a reach that is off by a hundredth
        share = -np.log(FALSE_ALARM) / len(ours)
        for end in (np.min, np.max):
            apart = abs(end(ours[:, side]) - end(theirs[:, side]))
            assert apart <= share * np.ptp(theirs[:, side])
        for other in range(side):
            for boxes in (ours, theirs):
                related: Any = stats.pearsonr(boxes[:, side], boxes[:, other])
                assert related.pvalue > FALSE_ALARM


def test_centre_clicks_exactly(rng):
    """On blobs, which have an inside; on noise, where ties are many; on full and empty."""
    noise = rng.normal(size=(40, 2, 10, 12))
    blobs = np.asarray(jax.image.resize(jnp.asarray(noise), (40, 2, 40, 48), "cubic")) > 0
    blobs[30:] = rng.random((10, 2, 40, 48)) < 0.5
    blobs[38, 0], blobs[39] = True, False
    truth, guess = blobs[:, :1], blobs[:, 1:]
    for prediction in (guess, None):
        points, labels = prompts.centre_click(jax.random.key(0), truth, prediction)
        given = None if prediction is None else torch.tensor(prediction)
        theirs, their_labels = get_next_point(torch.tensor(truth), given, method="center")
        np.testing.assert_array_equal(points, theirs)
        np.testing.assert_array_equal(labels, their_labels)
