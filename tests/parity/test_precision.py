"""Mixed precision: ours strays from float32 no further than the reference's autocast does.

Both in bfloat16 on the same clip, mask prompts, every object there: where a score changes its sign
or a click falls elsewhere, two runs part for good, which says nothing of precision.
"""
# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam2_jax import convert, losses, track
from sam2_jax.train import compute_copy
from tests.parity import reference
from tests.parity.conftest import ERRORS
from tests.parity.test_training import make_batch, make_plan

FRAMES = 3
SILENT = 1e-6  # of the largest norm: rounding of what is zero
RATIO = 1.5  # as far as we may be from float32, in units of the reference's own distance
VALID = np.ones((2, 2), bool)


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair("2.1")


def far(low: dict[str, np.ndarray], high: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative distance of each array of `low` from that of `high`, in the Euclidean norm."""
    norms = {name: float(np.linalg.norm(x)) for name, x in high.items()}
    heard = {name: x for name, x in norms.items() if x > SILENT * max(norms.values())}
    return {name: float(np.linalg.norm(low[name] - high[name])) / x for name, x in heard.items()}


def whole(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays as one vector."""
    return {"all": np.concatenate([arrays[name].ravel() for name in sorted(arrays)])}


def reference_run(model, batch, plan, seed, dtype):
    """(outputs, gradients) of the reference in a precision."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        frames, loss, _ = reference.train_forward(model, batch, plan)
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


def make_ours(model):
    """A function (params, batch, plan) -> (outputs, gradients), compiled once per precision."""

    def loss(params, batch, plan, dtype):
        out = track.track(
            model,
            compute_copy(params, jnp.dtype(dtype)),
            batch,
            plan,
            jax.random.key(0),
            deterministic=True,
            points=False,
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


def test_bfloat16(pair, rng, seed):
    plan = make_plan(FRAMES, cond=[0])
    batch = make_batch(rng, FRAMES, VALID)
    model = pair.reference
    bias = reference.score_bias(model)
    kept = bias.detach().clone()
    try:
        frames, _, _ = reference.train_forward(model, batch, plan)
        scores = [
            s
            for f in frames
            if f["mask_inputs"] is None
            for s in f["multistep_object_score_logits"]
        ]
        with torch.no_grad():
            bias += 5 - torch.stack(scores).min()
        theirs = {d: reference_run(model, batch, plan, seed, d) for d in ("float32", "bfloat16")}
        params = convert.from_reference(reference.state_of(model), pair.params)
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    run = make_ours(pair.model)
    ours = {d: run(params, batch, plan, d) for d in ("float32", "bfloat16")}
    (out, grads), (low_out, low_grads) = ours["float32"], ours["bfloat16"]
    (out_r, grads_r), (low_out_r, low_grads_r) = theirs["float32"], theirs["bfloat16"]
    grads, low_grads = ({k: g[k] for k in grads_r} for g in (grads, low_grads))
    distances = far(low_out_r, out_r)
    for name, distance in far(low_out, out).items():
        compare(name, distance, distances[name])
    compare(
        "gradient",
        far(whole(low_grads), whole(grads))["all"],
        far(whole(low_grads_r), whole(grads_r))["all"],
    )
    each = [np.median([*far(*g).values()]) for g in ((low_grads, grads), (low_grads_r, grads_r))]
    compare("gradient, median", *each)


def compare(name: str, ours: float, theirs: float) -> None:
    ERRORS[f"bfloat16: {name}, ours / the reference's"] = ours / theirs
    assert theirs > 1e-4, f"{name}: the reference does not differ in bfloat16"
    assert ours <= RATIO * theirs, f"{name}: {ours:.1e} > {RATIO} * {theirs:.1e}"
