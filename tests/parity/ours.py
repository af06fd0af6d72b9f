"""Our training pass on the clips, plans and prompts of the reference."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sam2_jax import convert, losses, sharding, track
from sam2_jax.types import Batch, FrameOut
from tests.parity import reference
from tests.parity.rollout import Drawn

# (model, params, batch, plan, prompts, gradient=True) -> loss, its terms, outputs, gradient
Step = Callable[..., tuple[float, dict[str, float], FrameOut, Any]]


def scatter(x: np.ndarray, axis: int, batch: Batch) -> np.ndarray:
    """The reference's flat axis of objects into ours of (videos, objects)."""
    full = np.zeros((*x.shape[:axis], *batch.valid.shape, *x.shape[axis + 1 :]), x.dtype)
    full[(slice(None),) * axis + np.nonzero(batch.valid)] = x
    return full


def prompts_of(drawn: Drawn, batch: Batch):
    """Points, labels and boxes with axes t (s) b o."""
    each = zip((drawn.points, drawn.labels, drawn.boxes), (2, 2, 1), strict=True)
    return tuple(scatter(x, axis, batch) for x, axis in each)


def loss_fn(params, model, batch, plan, prompts, remat: str):
    """Loss, and beside it terms and outputs, with prompts as given instead of drawn."""
    points, labels, boxes = prompts

    def click(key, truth, prediction=None, frame=None, step=None):
        return points[frame, step], labels[frame, step]

    def box(key, truth, frame):
        where = boxes[frame]
        return where, np.broadcast_to(np.array([2, 3]), where.shape[:3])

    key = jax.random.key(0)
    out = track.track(
        model,
        params,
        batch,
        plan,
        key,
        deterministic=True,
        click=click,
        box=box,
        remat=remat,
        last_memory=True,
    )
    total, terms = losses.total(out, batch.masks.swapaxes(0, 1), batch.valid)
    return total, (terms, out)


def make_step(remat: str) -> Step:
    """One program per model and shape of the batch, whose videos lie on a device each.

    So the number of objects, of the sharding and of the gradient's sum over devices is tested
    with everything else.
    """
    both: Any = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=(1, 5))

    def step(model, params, batch, plan, prompts):
        videos = len(batch.images)
        mesh = sharding.make_mesh(videos, 1, 1, jax.devices()[:videos])
        everywhere = sharding.replicated(mesh)

        def split(axis):
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))

        batch = jax.device_put(batch, split(0))
        params, plan = jax.device_put((params, plan), everywhere)
        prompts = jax.device_put(prompts, (split(2), split(2), split(1)))
        done = both(params, model, batch, plan, prompts, remat)
        (total, (terms, out)), grads = jax.device_get(done)
        return total, terms, out, grads

    return step


def converted(model: reference.Reference, like):
    """The reference's weights as ours."""
    return convert.from_reference(reference.state_of(model), like)
