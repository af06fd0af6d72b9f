"""Losses against the reference's on two devices, of which one has more objects than the other."""
# pyright: reportMissingImports=false

from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
import training.loss_fns
from jax.sharding import NamedSharding, PartitionSpec

from sam2_jax import losses, sharding
from sam2_jax.types import FrameOut
from tests.parity import tolerances
from tests.parity.compare import close
from tests.parity.rollout import loss_of

VALID = np.array([[1, 1, 1], [1, 0, 0]], bool)
SINGLE = 2  # correction clicks after the first
SMALL, SIDE = 8, 32
TERMS = ("loss_mask", "loss_dice", "loss_iou", "loss_class", "core_loss")
LEARNT = ("multi_masks", "multi_ious", "single_masks", "single_ious", "object_scores")


def random_outputs(rng: np.random.Generator) -> tuple[FrameOut, np.ndarray]:
    """Of a frame with a given mask, a corrected and a tracked one; and the truth."""
    t, (b, o) = 3, VALID.shape

    def normal(*shape):
        return rng.normal(0, 2, shape).astype(np.float32)

    def unit(*shape):
        return rng.random(shape, np.float32)

    truth = unit(t, b, o, SIDE, SIDE) < 0.4
    truth[:, :, 1] &= np.arange(t)[:, None, None, None] != 1  # an object that is away on a frame
    truth &= VALID[..., None, None]
    given = np.where(truth.any((3, 4)), 10.0, -10.0).astype(np.float32)
    scores = normal(t, 2 + SINGLE, b, o)
    scores[0, 0] = given[0]
    out = FrameOut(
        multi_masks=normal(t, 2, b, o, 3, SMALL, SMALL),
        multi_ious=unit(t, 2, b, o, 3),
        is_multi=np.array([[False, False], [True, False], [True, False]]),
        single_masks=normal(t, SINGLE, b, o, SMALL, SMALL),
        single_ious=unit(t, SINGLE, b, o),
        object_scores=scores,
        from_mask=np.array([True, False, False]),
        is_corrected=np.array([False, True, False]),
        mask=normal(t, b, o, SMALL, SMALL),
        pointer=normal(t, b, o, 4),
        memory=normal(t, b, o, 4, 4),
        points=normal(t, b, o, 1, 2),
        labels=np.zeros((t, b, o, 1), np.int32),
    )
    return out, truth


def their_frames(out: FrameOut, truth: np.ndarray, video: int, leaves: dict) -> list[dict]:
    """The outputs of one device as the reference has them."""
    real = VALID[video]

    def leaf(name, *at):
        tensor = leaves[name][at]
        return tensor[video][torch.tensor(real)]

    def upsampled(masks):
        return torch.nn.functional.interpolate(masks, (SIDE, SIDE), mode="bilinear")

    frames = []
    for i in range(len(truth)):
        count = 2 + SINGLE if out.is_corrected[i] else 1
        masks, ious = [], []
        for k in range(count):
            if out.from_mask[i]:
                mask = torch.tensor(truth[i, video, real])[:, None].float()
                masks.append(mask * 20 - 10)
                ious.append(torch.ones(len(mask), 1))
            elif k < 2:
                many = 3 if out.is_multi[i, k] else 1
                masks.append(upsampled(leaf("multi_masks", i, k)[:, :many]))
                ious.append(leaf("multi_ious", i, k)[:, :many])
            else:
                masks.append(upsampled(leaf("single_masks", i, k - 2)[:, None]))
                ious.append(leaf("single_ious", i, k - 2)[:, None])
        frames.append(
            {
                "multistep_pred_multimasks_high_res": masks,
                "multistep_pred_ious": ious,
                "multistep_object_score_logits": [
                    leaf("object_scores", i, k)[:, None] for k in range(count)
                ],
            }
        )
    return frames


def test_more_objects_on_one_device_than_on_the_other(rng):
    out, truth = random_outputs(rng)
    leaves = {name: torch.tensor(getattr(out, name), requires_grad=True) for name in LEARNT}
    expected: dict[str, Any] = dict.fromkeys(TERMS, 0.0)
    with (
        mock.patch.object(training.loss_fns, "is_dist_avail_and_initialized", lambda: True),
        mock.patch.object(training.loss_fns, "get_world_size", lambda: len(VALID)),
        mock.patch("torch.distributed.all_reduce", lambda x: x.fill_(float(VALID.sum()))),
    ):
        for video in range(len(VALID)):
            masks = torch.tensor(truth[:, video, VALID[video]])
            found = loss_of(their_frames(out, truth, video, leaves), masks)
            # Data parallelism averages the devices' gradients, so in effect their losses
            expected = {name: x + found[name] / len(VALID) for name, x in expected.items()}
    expected["core_loss"].backward()

    mesh = sharding.make_mesh(2, 1, 1, jax.devices()[:2])

    def place(x, videos_axis=None):
        axes = () if videos_axis is None else (*[None] * videos_axis, "data")
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    axes: dict[str, int | None] = dict.fromkeys(LEARNT, 2)
    axes |= dict.fromkeys(("is_multi", "from_mask", "is_corrected"))
    placed = {name: place(x, axes.get(name, 1)) for name, x in out._asdict().items()}
    learnt = {name: placed.pop(name) for name in LEARNT}

    @jax.jit
    def run(learnt, rest, truth, valid):
        def total(learnt):
            return losses.total(FrameOut(**learnt, **rest), truth, valid)

        return jax.value_and_grad(total, has_aux=True)(learnt)

    (total, terms), grads = run(learnt, placed, place(truth, 1), place(VALID, 0))
    for name, value in {"core_loss": total, **terms}.items():
        close(f"two devices: {name}", value, expected[name], tolerances.MODULE)
    for name in LEARNT:
        theirs = leaves[name].grad
        assert theirs is not None and theirs.any()
        close("two devices: gradient of outputs", grads[name], theirs, tolerances.MODULE, name=name)
