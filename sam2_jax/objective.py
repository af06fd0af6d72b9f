"""The loss of a clip as a function of the parameters, tracked whole or in segments."""

from typing import Any

import jax
import jax.numpy as jnp

from sam2_jax import losses, track
from sam2_jax.encode import Shared
from sam2_jax.train import LossFn, Metrics, Params, RandomKey
from sam2_jax.types import Array, Bank, Batch, PromptPlan


def make_loss(
    model: Any,
    weights: losses.LossWeights,
    remat: str,
    max_cond: int,
    points: bool,
    segment: int = 0,
    truncate: bool = False,
    shared_by: Shared | None = None,
) -> LossFn:
    """Loss of tracking a batch through a plan with all that training has of randomness.

    `remat`, `max_cond` and `shared_by` are of `track.track`. `points`: whether plans with clicks
    and boxes are ever drawn; images get no others. `segment`: clips of more frames are visited so
    many at a time, and of each part nothing but its memory bank is kept for the backward pass,
    which does the part again: so memory grows with the segment and hardly with the clip. The
    gradient is that of the whole clip, unless `truncate` ends it at the memories of earlier
    segments. The number of frames is to be a multiple of it.
    """

    def loss_fn(
        params: Params, batch: Batch, plan: PromptPlan, key: RandomKey, objects: Array
    ) -> tuple[Array, Metrics]:
        frames = batch.images.shape[1]
        tracking = track.make_tracking(model, params, batch, plan, points=points or frames == 1)
        most = min(max_cond, frames)
        keys, visits, bank = track.begin(tracking, batch, plan, key, most, shared_by=shared_by)
        images = jnp.asarray(batch.images).swapaxes(0, 1)[plan.order]

        def part(bank: Bank, item: Any) -> tuple[Bank, tuple[Array, Metrics]]:
            images, visits = item
            bank, outs = track.follow(tracking, bank, images, visits, keys, remat, shared_by)
            loss = losses.total(outs, visits.truth, batch.valid, weights, objects)
            return jax.lax.stop_gradient(bank) if truncate else bank, loss

        if not 0 < segment < frames:
            return part(bank, (images, visits))[1]
        parts = jax.tree.map(
            lambda x: x.reshape(frames // segment, segment, *x.shape[1:]), (images, visits)
        )
        _, each = jax.lax.scan(jax.checkpoint(part), bank, parts)
        return jax.tree.map(lambda x: x.sum(0), each)

    return loss_fn
