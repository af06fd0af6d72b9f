"""The whole training forward and backward pass against the reference's SAM2Train.

Every case is a clip of noise and rectangles for which the reference's decisions are beyond doubt
(see cases.py), run by the reference in float32 and float64 and by us, with the same prompts.
"""
# pyright: reportMissingImports=false

import jax
import numpy as np
import pytest
import torch

from sam2_jax import convert
from sam2_jax.decode import NO_OBJECT
from sam2_jax.resize import resize
from tests.parity import tolerances
from tests.parity.cases import Case, Chosen, choose, scores_of, winners_of
from tests.parity.compare import close_to_exact, judge, record, same_mask
from tests.parity.gradients import Truth, compare_gradients
from tests.parity.ours import converted, prompts_of

A, B, C = [[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]]
ALWAYS = [(0, k) for k in range(7)]
CASES = {
    "mask1": Case(8, dict(cond=[0]), A),
    "mask2": Case(8, dict(cond=[0, 5]), B),  # frames visited out of order
    "point11": Case(8, dict(cond=[0], corrected=[0], points=True, from_truth=ALWAYS), C),
    "point12": Case(8, dict(corrected=[0, 4], points=True, from_truth=[(0, 1), (4, 2)]), A),
    "point22": Case(8, dict(cond=[0, 3], corrected=[0, 3], points=True), B),
    "box11": Case(8, dict(corrected=[0], box=[0], points=True), A),
    # On frame 4 the last object is absent: the reference's box around nothing
    "box22": Case(8, dict(cond=[0, 4], corrected=[0, 4], box=[0, 4], points=True), B),
    "click and box": Case(8, dict(cond=[0, 5], corrected=[0, 5], box=[5], points=True), C),
}
IMAGES = {
    "image, click": Case(1, dict(corrected=[0], points=True), A),
    "image, box": Case(1, dict(corrected=[0], box=[0], points=True), B),
}
LONG = {  # than the window of memories (6) and of pointers (15)
    "long, mask2": Case(18, dict(cond=[0, 9]), [[1, 1]]),
    "long, point12": Case(18, dict(corrected=[0, 6], points=True), [[1, 1]]),
}
VERSION_2_0 = ("mask2", "point12")


@pytest.mark.parametrize("name", [*CASES, *IMAGES])
def test_training_pass(make_pair, step, seed, resolution, is_nano, name):
    compare(make_pair("2.1"), step, name, seed, resolution, is_nano)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.nano
def test_training_pass_of_a_long_clip(make_pair, step, seed, resolution, is_nano, name):
    """Windows do not depend on the model's size; test_video.py goes beyond them with every size."""
    compare(make_pair("2.1"), step, name, seed, resolution, is_nano)


@pytest.mark.parametrize("name", VERSION_2_0)
def test_training_pass_of_version_2_0(make_pair, step, seed, resolution, is_nano, name):
    compare(make_pair("2.0"), step, name, seed, resolution, is_nano, "2.0: ")


def compare(pair, step, name, seed, resolution, is_nano, prefix=""):
    """Outputs, losses and gradients."""
    case = (CASES | IMAGES | LONG)[name]
    if not is_nano:  # one video of two objects is enough to wait for
        case = case._replace(valid=[[1, 1]])
    chosen = choose(pair.reference, case, seed, resolution)
    check_both_ways(chosen)
    batch, plan = chosen.batch, chosen.plan
    prompts = prompts_of(chosen.run.drawn, batch)
    params = converted(chosen.model, pair.params)
    total, terms, out, grads = step(pair.model, params, batch, plan, prompts)
    for i in range(case.frames):
        compare_frame(jax.tree.map(lambda x, i=i: x[i], out), chosen, i, prefix)
    compare_losses({"core_loss": total, **terms}, chosen, prefix)
    compare_gradients(
        Truth(chosen, plain=not is_nano), convert.to_reference(grads), f"{prefix}gradient"
    )


def check_both_ways(chosen: Chosen):
    """The clip has objects present and absent, and masks that win and lose."""
    for scores in scores_of(chosen.run, chosen.plan).values():
        assert (scores > 0).any() and not (scores > 0).all()
    winners = winners_of(chosen.run, chosen.plan)
    assert not len(winners) or len(winners.unique()) > 1


def compare_frame(out, chosen: Chosen, i: int, prefix: str):
    """Every pass of one frame: masks, IoUs, object scores; then pointer and memory."""
    valid, side = chosen.batch.valid, chosen.batch.masks.shape[-2:]
    frame = chosen.exact.frames[i]

    def of(run, key, k) -> np.ndarray:
        value = run.frames[i][key]
        return (value if k is None else value[k]).detach().numpy()

    def near(part, ours, key, k=None, scale=0.0):
        exact, runs = of(chosen.exact, key, k), (of(run, key, k) for run in chosen.runs())
        ours = ours[valid].reshape(exact.shape)
        place = f"frame {i}, pass {k}"
        close_to_exact(prefix + part, ours, runs, exact, tolerances.ROLLOUT, scale, place)

    def masks(part, ours, key, k=None):
        """Objects predicted absent have the same constant; of the others the logits."""
        exact = of(chosen.exact, key, k)
        ours = np.asarray(ours)[valid].reshape(exact.shape)
        there = exact != NO_OBJECT
        assert np.array_equal(ours != NO_OBJECT, there)
        runs = (of(run, key, k)[there] for run in chosen.runs())
        given = ours[there], runs, exact[there], tolerances.ROLLOUT
        bound = close_to_exact(prefix + part, *given, name=f"frame {i}, pass {k}")
        same_mask(f"{prefix}binary {part}", ours[there], exact[there], bound)

    steps = len(frame["multistep_pred_ious"])
    assert out.is_corrected == (steps > 1)
    for k in range(steps):
        near("object score", out.object_scores[k], "multistep_object_score_logits", k, 1.0)
        if out.from_mask:
            continue
        many = frame["multistep_pred_ious"][k].shape[1]
        if k < 2:
            assert out.is_multi[k] == (many == 3)
            low, ious = out.multi_masks[k][:, :, :many], out.multi_ious[k][:, :, :many]
        else:
            low, ious = out.single_masks[k - 2][:, :, None], out.single_ious[k - 2][..., None]
        near("predicted IoU", ious, "multistep_pred_ious", k)
        masks("low-resolution masks", low, "multistep_pred_multimasks", k)
        high = resize(jax.numpy.asarray(low), side)
        masks("high-resolution masks", high, "multistep_pred_multimasks_high_res", k)
    masks("final mask", out.mask, "pred_masks")
    near("object pointer", out.pointer, "obj_ptr")
    memory = np.moveaxis(out.memory, -1, -2)  # channels first, as theirs
    near("memory", memory, "maskmem_features")


def compare_losses(ours: dict, chosen: Chosen, prefix: str):
    """Each term and the total, relative to itself."""
    for name, value in ours.items():
        true = float(chosen.exact.losses[name].detach())
        runs = (float(run.losses[name].detach()) for run in chosen.runs())
        # A pixel whose logit rounding puts on either side of 0 counts in the IoU or not
        slack = 0.0
        if name in ("loss_iou", "core_loss"):
            slack = worth_of_doubtful_pixels(chosen)
            share = slack / abs(true)
            record(f"{prefix}{name}: share left to doubtful pixels", share, tolerances.DOUBTFUL)
            assert share <= tolerances.DOUBTFUL
        error = max(abs(float(value) - true) - slack, 0.0) / abs(true)
        own = (abs(theirs - true) / abs(true) for theirs in runs)
        judge(f"{prefix}{name}", error, tolerances.LOSS, own)


def worth_of_doubtful_pixels(chosen: Chosen) -> float:
    """How much the IoU loss may change by pixels that float32 cannot tell from 0."""
    worth = 0.0
    video, slot = np.nonzero(chosen.batch.valid)
    truths = chosen.batch.masks[video, :, slot].swapaxes(0, 1)
    for i, (mine, true) in enumerate(zip(chosen.run.frames, chosen.exact.frames, strict=True)):
        truth = torch.tensor(truths[i])[:, None]
        key = "multistep_pred_multimasks_high_res"
        for rounded, exact in zip(mine[key], true[key], strict=True):
            noise = (rounded - exact).abs().max()
            doubtful = (exact.abs() <= tolerances.OWN * noise).sum((2, 3))
            union = ((exact > 0) | truth).sum((2, 3)).clamp(min=1)
            worth += float((doubtful / union).sum()) / exact.shape[1] / len(video)
    return worth
