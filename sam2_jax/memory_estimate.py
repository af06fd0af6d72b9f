"""What a device must hold during a step, from shapes alone, before anything is compiled.

State and inputs are exact. What the backward pass keeps is counted by the kinds of arrays there
are. scripts/compile_report.py compiles the step and knows; this knows within ERROR in no time: of
base_plus on eight H100 (docs/scaling.md) it says 15 % less than the report with train.remat=frame,
17 % more with full; of tiny on an image with 8 and with 16 objects, in float32 on a CPU, 24 and
20 % less.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sam2_jax import sharding, train
from sam2_jax.memory import WINDOW
from sam2_jax.model.kernels import LARGE, XLA
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.model.variants import VARIANTS, Variant
from sam2_jax.types import UserError

ERROR = 0.35  # a step is refused only if it does not fit by more than this
# Arrays of a token's width that a layer keeps for its backward pass: of a block of the trunk norms,
# queries, keys, values, attention's result, and the hidden layer, four wide, before and after its
# gelu; of memory attention the same without the hidden layer, which has a width of its own.
KEPT_BY_BLOCK, KEPT_BY_LAYER = 18, 12
# The same of a pass of the mask decoder and of the memory encoder, as many as a gradient of each
# alone keeps: in the dtype of the computation, and in float32 (norms and gelus).
KEPT_BY_PASS, KEPT_BY_MEMORY = (20, 20), (28, 52)
# Arrays of an image's size for every object: masks and losses, forward and backward, in float32
MASKS = 6
FLOAT32 = 4
ANY_SIDE = 64  # no parameter's shape depends on it
ONE_DEVICE: Mapping[str, int] = dict.fromkeys(sharding.AXES, 1)  # a mesh's axes, by name

Estimate = dict[str, int]  # bytes by name


def estimate(config: Any, state: train.State, mesh: Mesh) -> Estimate:
    """Bytes of one device; the sum is to be compared with `peak_bytes` of a report.

    Of a mixture those of a step on its heaviest source.
    """
    copy = _copy_bytes(state.params, config.train.precision)
    return _whole(config, sharded_bytes(state, mesh), copy, mesh.shape)


def unsharded(config: Any, devices: int = 1) -> Estimate:
    """`estimate` for devices that each hold all parameters, and two moments of every one.

    No device is asked for anything: it can be had before the processes of a run have met.
    """
    m, precision = config.model, config.train.precision
    parameters, copy = _parameter_bytes(m.variant, m.version, precision)
    sizes = {"parameters": parameters, "optimizer": 2 * parameters}
    if config.train.ema_decay:
        sizes["moving_average"] = parameters
    return _whole(config, sizes, copy, {**ONE_DEVICE, "data": devices})


def sources(config: Any) -> dict[str, Any]:
    """Settings of every source of training data by its name in a mixture, or of `data` alone."""
    return dict(config.data.mixture.items()) or {"data": config.data}


def heaviest_source(config: Any, mesh: Mapping[str, int] = ONE_DEVICE) -> tuple[str, Any]:
    """(name, settings) of the source of training data on which a step takes the most memory."""
    found = sources(config)
    name = max(found, key=lambda name: total(_of_source(config, found[name], mesh)))
    return name, found[name]


def sharded_bytes(tree: Any, mesh: Mesh) -> dict[str, int]:
    """Bytes per device of each part of a state, as `sharding.tree_shardings` lays them out."""

    def of(part: Any) -> int:
        return sum(
            math.prod(layout.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, layout in zip(
                jax.tree.leaves(part),
                jax.tree.leaves(sharding.tree_shardings(part, mesh)),
                strict=True,
            )
        )

    sizes = {"parameters": of(tree.params), "optimizer": of(tree.opt_state)}
    return sizes | ({"moving_average": of(tree.ema)} if tree.ema is not None else {})


def _copy_bytes(params: Any, precision: str) -> int:
    """Of the parameters as a step computes with them."""
    copy = jax.eval_shape(lambda p: train.compute_copy(p, jnp.dtype(precision)), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(copy))


@functools.cache
def _parameters(variant: str, version: str) -> Any:
    """Shapes of a model's parameters."""
    model = make_sam2(variant, ANY_SIDE, version, kernel=XLA)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.cache
def _parameter_bytes(variant: str, version: str, precision: str) -> tuple[int, int]:
    """(bytes of all parameters, `_copy_bytes`) of a model."""
    params = _parameters(variant, version)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return whole, _copy_bytes(params, precision)


def _whole(config: Any, sizes: dict[str, int], copy: int, mesh: Mapping[str, int]) -> Estimate:
    """Of a device whose share of the state has `sizes`, and which makes a `copy` of all of it."""
    _, source = heaviest_source(config, mesh)
    return {
        **sizes,
        "compute copy": copy,
        "gradients": copy + sizes["parameters"],
        **_of_source(config, source, mesh),
    }


def _of_source(config: Any, source: Any, mesh: Mapping[str, int]) -> Estimate:
    """What a step on a source holds beside the state and its copies."""
    dtype, remat = jnp.dtype(config.train.precision), config.train.remat
    videos = max(1, source.batch_size // (mesh["data"] * mesh["fsdp"]))
    part = max(1, videos // config.train.accumulate)  # what is worked off at a time
    frames, objects, side = source.num_frames, source.max_objects, config.model.resolution
    mine = -(-objects // mesh["model"])  # of objects; all devices of a video have its images
    segment = config.train.segment
    held = segment if 0 < segment < frames else frames  # tracked at a time
    # What the backward pass of one frame, or of all at once, has in memory
    encoded = 1 if remat == "full" else -(-held // mesh["model"])
    # The loops keep the bank of every visit and of every segment
    kept = held + (frames // held if held < frames else 0)
    slots = min(frames, WINDOW + config.prompts.max_cond_frames)
    tokens, v = (side // 16) ** 2, VARIANTS[config.model.variant]
    bank = slots * tokens * v.memory_dim * dtype.itemsize if frames > 1 else 0
    return {
        "clips": videos * frames * side**2 * (3 + objects),
        "image features": 2 * part * held * _features(v, side) * dtype.itemsize,
        "image encoder": part * encoded * _encoder(config, dtype.itemsize),
        "memories": part * mine * kept * bank,
        "visits": part * mine * _visits(config, frames, held, dtype),
        "masks": part * mine * (held * _logits(config, frames) + MASKS * side**2 * FLOAT32),
    }


def _features(v: Variant, side: int) -> int:
    """Elements of a frame's features at strides 16, 8 and 4."""
    c = v.hidden_dim
    return (side // 16) ** 2 * c + (side // 8) ** 2 * c // 4 + (side // 4) ** 2 * c // 8


def _weights(queries: int, keys: int, config: Any, itemsize: int, dropout: bool = False) -> int:
    """Bytes of the weights of one head of attention that are kept: a large one may keep none."""
    if queries * keys >= LARGE and config.model.attention != XLA.name:
        return 0
    return queries * keys * (FLOAT32 + itemsize + dropout)


def _encoder(config: Any, itemsize: int) -> int:
    """Bytes of a frame that the trunk keeps: per token, and the weights of its attention."""
    v, side = VARIANTS[config.model.variant], config.model.resolution
    total, index = 0, 0
    for stage, depth in enumerate(v.stages):
        tokens = (side // (4 * 2**stage)) ** 2
        dim, heads = v.embed_dim * 2**stage, v.num_heads * 2**stage
        for _ in range(depth):
            window = tokens if index in v.global_blocks else v.window_spec[stage] ** 2
            weights = heads * _weights(window, window, config, itemsize) * -(-tokens // window)
            total += tokens * KEPT_BY_BLOCK * dim * itemsize + weights
            index += 1
    return total


def _visits(config: Any, frames: int, held: int, dtype: Any) -> int:
    """Bytes of one object: memory attention, the mask decoder and the memory encoder."""
    v, tokens = VARIANTS[config.model.variant], (config.model.resolution // 16) ** 2

    def bytes_of(kept: tuple[int, int]) -> int:
        return tokens * v.hidden_dim * (kept[0] * dtype.itemsize + kept[1] * FLOAT32)

    decoded = bytes_of(KEPT_BY_PASS)
    remembering = _remembering(config, frames, dtype)
    if config.train.remat == "none":
        made = bytes_of(KEPT_BY_MEMORY) if frames > 1 else 0
        # The pass after a click is computed again one by one in any case
        return held * (decoded + made + remembering) + decoded * _has_clicks(config, frames)
    again = max(remembering, decoded * _has_clicks(config, frames))
    # Of a visit the first pass and the one after a click, which need not be there with memory
    # attention; no more are the insides of the memory encoder, which are about as large.
    return max(again, decoded * (1 + _has_clicks(config, frames)))


def _has_clicks(config: Any, frames: int) -> bool:
    """Whether a step may correct by clicks; images are never prompted with masks."""
    return config.prompts.corrections > 0 and (frames == 1 or config.prompts.prob_points > 0)


def _remembering(config: Any, frames: int, dtype: Any) -> int:
    """Bytes of one object in memory attention, all layers; of memories it holds no keys."""
    if frames == 1:
        return 0  # there are none
    v, tokens = VARIANTS[config.model.variant], (config.model.resolution // 16) ** 2
    dropout = config.model.attention_dropout > 0
    widths = tokens * (KEPT_BY_LAYER * v.hidden_dim + 2 * v.feedforward_dim)
    weights = _weights(tokens, tokens, config, dtype.itemsize, dropout)
    return v.memory_layers * (widths * dtype.itemsize + weights)


def _logits(config: Any, frames: int) -> int:
    """Bytes of an object's logits on a frame, of all decoder passes, at a quarter of the side."""
    passes = 3 + (3 + config.prompts.corrections) * _has_clicks(config, frames)
    return 2 * passes * (config.model.resolution // 4) ** 2 * FLOAT32


def size(count: int | float | None) -> str:
    """Bytes as GiB, or MiB where that is less than one."""
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def total(found: Estimate) -> int:
    """Of all."""
    return sum(found.values())


def describe(found: Estimate) -> str:
    """In a line: the sum and the largest shares."""
    largest = sorted(found, key=lambda name: -found[name])[:3]
    parts = ", ".join(f"{name} {size(found[name])}" for name in largest)
    return f"about {size(total(found))} a device ({parts})"


def device_limit(devices: list[Any]) -> int | None:
    """Bytes that a program may use on the smallest of the devices; None: they do not tell."""
    stats = [device.memory_stats() for device in devices]
    limits = [each["bytes_limit"] for each in stats if each and "bytes_limit" in each]
    return min(limits) if limits and len(limits) == len(devices) else None


def check(found: Estimate, limit: int | None) -> str:
    """A warning where the step may not fit, else ''.

    Raises:
        UserError: it cannot fit, even if the estimate is too high by all of its known error.
    """
    if limit is None or total(found) <= limit:
        return ""
    text = (
        f"the step takes {describe(found)}, and a device has {size(limit)}: set "
        "train.remat=full, a larger mesh.fsdp, train.accumulate, train.segment for long clips, or "
        "a smaller data.batch_size, data.max_objects, data.num_frames or model.resolution"
    )
    if total(found) > limit * (1 + ERROR):
        raise UserError(f"out of memory before it begins: {text}")
    return f"warning: memory may not suffice: {text}"
