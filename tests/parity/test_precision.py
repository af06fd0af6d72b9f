"""Mixed precision: ours strays from float32 no further than the reference's autocast does.

Both in bfloat16 on the same clip, mask prompts, every object there: where a score changes its sign
or a click falls elsewhere, two runs part for good, which says nothing of precision.
"""
# pyright: reportMissingImports=false

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam2_jax import convert, losses, track
from sam2_jax.resize import resize
from sam2_jax.train import compute_copy
from tests.parity import reference, tolerances
from tests.parity.cases import make_batch, make_plan
from tests.parity.compare import record
from tests.parity.rollout import train_forward

FRAMES = 3
# Errors of rounding that grow through a clip are spread over a factor of ten. From draw to draw the
# logarithm of the ratio of two means moves by 0.35 with 2 clips, by 0.16 with 12, by 0.1 with 24;
# clips of larger models take longer.
CLIPS_NANO, CLIPS = 24, 12
VALID = np.ones((2, 2), bool)


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair("2.1")


def far(low: dict[str, np.ndarray], high: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative distance of each array of `low` from that of `high`, in the Euclidean norm."""
    norms = {name: float(np.linalg.norm(x)) for name, x in high.items()}
    heard = {name: x for name, x in norms.items() if x > tolerances.SILENT * max(norms.values())}
    return {name: float(np.linalg.norm(low[name] - high[name])) / x for name, x in heard.items()}


def whole(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays as one vector."""
    return {"all": np.concatenate([arrays[name].ravel() for name in sorted(arrays)])}


def reference_run(model, batch, plan, seed, dtype):
    """(outputs, gradients) of the reference in a precision."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        frames, loss, _ = train_forward(model, batch, plan)
    loss["core_loss"].float().backward()
    later = [f for f in frames if f["mask_inputs"] is None]
    outputs = {
        "masks": torch.stack([f["multistep_pred_multimasks"][0] for f in later]),
        "IoU": torch.stack([f["multistep_pred_ious"][0] for f in later]),
        "object scores": torch.stack([f["multistep_object_score_logits"][0] for f in later]),
        "pointers": torch.stack([f["obj_ptr"] for f in frames]),
        "memories": torch.stack([f["maskmem_features"] for f in frames]),
    }
    outputs = {name: x.detach().float().numpy() for name, x in outputs.items()}
    grads = {k: p.grad.float().numpy() for k, p in model.named_parameters() if p.grad is not None}
    return outputs, grads


@functools.cache
def make_ours(model):
    """A function (params, batch, plan) -> (outputs, gradients), compiled once for all seeds."""

    def loss(params, batch, plan, dtype):
        out = track.track(
            model,
            compute_copy(params, jnp.dtype(dtype)),
            batch,
            plan,
            jax.random.key(0),
            deterministic=True,
            remat="frame",  # takes less time to compile
            points=False,
            last_memory=True,
        )
        total, _ = losses.total(out, batch.masks.swapaxes(0, 1), batch.valid)
        return total, out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)

    def run(params, batch, plan, dtype):
        (_, out), grads = jax.device_get(both(params, batch, plan, dtype))
        later = ~out.from_mask
        outputs = {
            "masks": out.multi_masks[later, 0],
            "IoU": out.multi_ious[later, 0],
            "object scores": out.object_scores[later, 0],
            "pointers": out.pointer,
            "memories": out.memory,
        }
        return {k: np.asarray(x, np.float32) for k, x in outputs.items()}, convert.to_reference(
            grads
        )

    return run


def decisions(outputs, batch) -> list[np.ndarray]:
    """What is chosen, not computed: the mask that each pass teaches, the one that it trusts, and
    whether each predicted IoU is too high or too low."""
    ious = outputs["IoU"].reshape(FRAMES - 1, VALID.size, 3)
    masks = outputs["masks"].reshape(*ious.shape, *outputs["masks"].shape[-2:])
    truth = batch.masks[:, 1:].swapaxes(1, 2)  # b o t
    truth = truth.reshape(VALID.size, FRAMES - 1, 1, *truth.shape[-2:]).swapaxes(0, 1)
    truth = np.broadcast_to(truth, (*ious.shape, *truth.shape[-2:]))
    each, overlap = scores_of_masks(masks, truth)
    return [np.asarray(each.argmin(-1)), ious.argmax(-1), ious > overlap]


@jax.jit
def scores_of_masks(masks, truth):
    """The loss that chooses among masks, and their IoU, at the side of `truth`."""
    full = resize(jnp.asarray(masks), truth.shape[-2:])
    loss = 20 * losses.focal_loss(full, truth) + losses.dice_loss(full, truth)
    return loss, losses.mask_iou(full, truth)


def clip_distances(pair, run, rng, seed) -> tuple[dict[str, float], dict[str, float]] | None:
    """How far bfloat16 is from float32 on one clip: ours, the reference's.

    None if a decision changes in one of the two: then its gradient is of another loss.
    """
    plan = make_plan(FRAMES, cond=[0])
    batch = make_batch(rng, FRAMES, VALID, pair.model.resolution)
    model = pair.reference
    bias = reference.score_bias(model)
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            frames, _, _ = train_forward(model, batch, plan)
        later = [frame for frame in frames if frame["mask_inputs"] is None]
        scores = [s for frame in later for s in frame["multistep_object_score_logits"]]
        with torch.no_grad():
            bias += 5 - torch.stack(scores).min()
        theirs = {d: reference_run(model, batch, plan, seed, d) for d in ("float32", "bfloat16")}
        params = convert.from_reference(reference.state_of(model), pair.params)
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    ours = {d: run(params, batch, plan, d) for d in ("float32", "bfloat16")}
    decided = [decisions(outputs, batch) for runs in (ours, theirs) for outputs, _ in runs.values()]
    if any((x != y).any() for d in decided for x, y in zip(d, decided[0], strict=True)):
        return None
    taught = theirs["float32"][1].keys()  # what has a gradient

    def distances(runs):
        (high, high_grads), (low, low_grads) = runs["float32"], runs["bfloat16"]
        pair_of_grads = [{name: g[name] for name in taught} for g in (low_grads, high_grads)]
        return far(low, high) | {
            "gradient": far(*map(whole, pair_of_grads))["all"],
            "gradient, median": float(np.median([*far(*pair_of_grads).values()])),
        }

    return distances(ours), distances(theirs)


def test_bfloat16(pair, rng, seed, is_nano):
    """On the mean of several clips on which both precisions decide alike."""
    run = make_ours(pair.model)
    clips = CLIPS_NANO if is_nano else CLIPS
    found = (clip_distances(pair, run, rng, seed) for _ in range(4 * clips))
    taken = list(itertools.islice((x for x in found if x), clips))
    assert len(taken) == clips
    ours, theirs = zip(*taken, strict=True)
    for name in ours[0]:
        mine, reference_s = (float(np.mean([d[name] for d in all_])) for all_ in (ours, theirs))
        record(f"bfloat16: {name}, ours / the reference's", mine / reference_s, tolerances.RATIO)
        assert reference_s > tolerances.DIFFERS, (
            f"{name}: the reference does not differ in bfloat16"
        )
        assert mine <= tolerances.RATIO * reference_s, (
            f"{name}: {mine:.1e} > {tolerances.RATIO} * {reference_s:.1e}"
        )
