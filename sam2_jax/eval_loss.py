"""The loss on evaluation clips: the same few clips, frames and objects at every evaluation.

Clips are spread evenly over a set. Of each the first `num_frames` frames are taken from the first
one with an object on, and the lowest object ids seen there, with no augmentation and no dropout.
The prompt is the mask of the first frame; of images, where that would be the answer, one click.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sam2_jax import losses, prompts, sharding, track, train
from sam2_jax.data import pipeline, transforms
from sam2_jax.data.sources import VideoSource
from sam2_jax.products import multiplying
from sam2_jax.types import Array, Batch, PromptPlan, UserError
from sam2_jax.validation import EvalSet, row_name

CLICK_KEY = 0  # of the clicks on images: the same ones at every evaluation


def make_eval_loss(
    config: Any, model: Any, sets: Sequence[EvalSet], mesh: Mesh
) -> Callable[[train.Params, int], dict[str, float]]:
    """`(params, step)` -> `eval/SET/loss`, `eval/SET/loss_mask` ... of every set; prints them.

    A batch holds one clip for each share of the mesh, whatever the number of clips, so that one
    program is compiled and memory is that of a training batch without its backward pass. Losses
    are means over all objects, as in training. With `eval.loss_clips` 0 nothing is computed.

    Raises:
        UserError: there is no set, or no clip of a set that is long enough.
    """
    limit = config.eval.loss_clips
    if not limit:
        return lambda params, step: {}
    if not sets:
        raise UserError(
            f"eval.loss_clips={limit} finds no evaluation clips: give --config.data.eval_root or "
            "eval.sets, or take 0"
        )
    entries = list(config.data.mixture.values()) or [config.data]
    num_frames = max(entry.num_frames for entry in entries)
    most = max(entry.max_objects for entry in entries)
    side, shares = config.model.resolution, mesh.shape["data"] * mesh.shape["fsdp"]
    chosen = {each.name: choose(each, limit, num_frames) for each in sets}
    sources = {each.name: each.source for each in sets}
    sums = jax.jit(functools.partial(_sums, config, model, mesh))

    def one_set(params: train.Params, name: str) -> dict[str, float]:
        source, clips = sources[name], chosen[name]
        totals: dict[str, float] = {}
        objects = 0
        for start in range(0, len(clips), shares):
            rows = [*clips[start : start + shares], *[None] * shares][:shares]
            per_process = shares // jax.process_count()
            mine = rows[jax.process_index() * per_process :][:per_process]
            examples = [make_example(source, clip, num_frames, most, side) for clip in mine]
            batch = sharding.put_batch(pipeline.stack(examples), mesh)
            found, count = jax.device_get(sums(params, batch))
            for key, value in found.items():
                totals[key] = totals.get(key, 0.0) + float(value)
            objects += int(count)
        return {key: value / max(objects, 1) for key, value in totals.items()}

    def eval_loss(params: train.Params, step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        for name in sources:
            found = one_set(params, name)
            row |= {row_name(name, key): value for key, value in found.items()}
            if jax.process_index() == 0:
                told = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
                tqdm.write(f"step {step}{', ' * bool(name)}{name}: evaluation {told}")
        return row

    return eval_loss


def choose(each: EvalSet, limit: int, num_frames: int) -> list[tuple[int, int]]:
    """(clip, first frame) of up to `limit` clips, evenly spread over those that are long enough.

    Looks at no more clips than it needs. Raises `UserError` if there is none.
    """
    source = each.source
    count = len(source)
    first = [i * count // min(limit, count) for i in range(min(limit, count))]
    found: list[tuple[int, int]] = []
    for clip in [*first, *(i for i in range(count) if i not in set(first))]:
        if len(found) == limit:
            break
        for start in range(source.video(clip).num_frames - num_frames + 1):
            if source.objects(clip, start):
                found.append((clip, start))
                break
    if not found:
        raise UserError(
            f"eval.loss_clips={limit}: no clip of {source.name} has {num_frames} frames "
            "(data.num_frames) from one with an object on: take 0, or longer clips"
        )
    return sorted(found)


def make_example(
    source: VideoSource, clip: tuple[int, int] | None, num_frames: int, most: int, side: int
) -> pipeline.Example:
    """One clip as training takes it, only resized; None: nothing, without a valid object."""
    if clip is None:
        frames = np.zeros((num_frames, side, side, 3), np.uint8)
        masks = np.zeros((num_frames, most, side, side), bool)
        return pipeline.Example(frames, masks, np.zeros(most, bool))
    index, start = clip
    objects = source.objects(index, start)[:most]
    frames, masks = source.read(index, range(start, start + num_frames), objects)
    frames, masks = transforms.resize_clip(frames, masks, (side, side))
    masks = np.pad(masks, ((0, 0), (0, most - len(objects)), (0, 0), (0, 0)))
    return pipeline.Example(frames, masks, np.arange(most) < len(objects))


def make_plan(num_frames: int) -> PromptPlan:
    """The mask of the first frame; of an image one click."""
    plan = prompts.mask_plan(num_frames)
    return plan._replace(use_points=jnp.ones((), bool)) if num_frames == 1 else plan


def _sums(
    config: Any, model: Any, mesh: Mesh, params: train.Params, batch: Batch
) -> tuple[dict[str, Array], Array]:
    """Loss and terms summed over the objects of a batch, and the number of these."""
    dtype = jnp.dtype(config.train.precision)
    weights = losses.LossWeights(**config.loss)
    layout = sharding.tree_specs(params, mesh)
    num_frames = batch.images.shape[1]

    @multiplying(config.train.precision)
    def on_device(params: train.Params, batch: Batch) -> tuple[dict[str, Array], Array]:
        out = track.track(
            model,
            sharding.gather(train.compute_copy(params, dtype), layout),
            batch,
            make_plan(num_frames),
            jax.random.key(CLICK_KEY),
            deterministic=True,
            max_cond=1,
            points=num_frames == 1,
        )
        masks = jnp.moveaxis(jnp.asarray(batch.masks), 1, 0)
        loss, terms = losses.total(out, masks, batch.valid, weights, jnp.ones((), jnp.int32))
        return jax.lax.psum(({"loss": loss} | terms, batch.valid.sum()), sharding.BATCH_AXES)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(layout, sharding.BATCH),
        out_specs=sharding.EVERYWHERE,
        check_vma=False,  # the loops begin with constants, which it takes for something else
    )(params, batch)
