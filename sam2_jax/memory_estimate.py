"""What a device must hold during a step, from shapes alone, before anything is compiled.

State and inputs are exact. What the backward pass keeps is counted by the kinds of arrays there
are. scripts/compile_report.py compiles the step and knows; this knows within ERROR in no time: of
base_plus on eight H100 (docs/scaling.md) it says 16 % less than the report with train.remat=frame,
24 % more with full.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sam2_jax import compiled, train
from sam2_jax.compiled import sharded_bytes
from sam2_jax.memory import WINDOW
from sam2_jax.model.kernels import LARGE
from sam2_jax.model.sam2 import MAX_POINTERS, NUM_MEMORIES, Sam2
from sam2_jax.model.variants import Variant
from sam2_jax.suggest import size
from sam2_jax.types import UserError

ERROR = 0.35  # a step is refused only if it does not fit by more than this
# Arrays of a token's width that a layer keeps for its backward pass: of a block of the trunk norms,
# queries, keys, values, attention's result, and the hidden layer, four wide, before and after its
# gelu; of memory attention the same without the hidden layer, which has a width of its own.
KEPT_BY_BLOCK, KEPT_BY_LAYER = 18, 12
# Arrays of an image's size for every object: masks and losses, forward and backward, in float32
MASKS = 6
FLOAT32 = 4

Estimate = dict[str, int]  # bytes by name


def estimate(config: Any, model: Sam2, state: train.State, mesh: jax.sharding.Mesh) -> Estimate:
    """Bytes of one device; the sum is to be compared with `peak_bytes` of a report."""
    _, source = compiled.heaviest_source(config)
    dtype, remat = jnp.dtype(config.train.precision), config.train.remat
    videos = max(1, source.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]))
    part = max(1, videos // config.train.accumulate)  # what is worked off at a time
    frames, objects, side = source.num_frames, source.max_objects, config.model.resolution
    mine = -(-objects // mesh.shape["model"])  # of objects; all devices of a video have its images
    segment = config.train.segment
    held = segment if 0 < segment < frames else frames  # tracked at a time
    sizes = sharded_bytes(state, mesh)
    copy = jax.eval_shape(lambda p: train.compute_copy(p, dtype), state.params)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(copy))
    # What the backward pass of one frame, or of all at once, has in memory
    encoded = 1 if remat == "full" else -(-held // mesh.shape["model"])
    visited = held if remat == "none" else 1
    # The loops keep the bank for every frame and every segment that they will compute again
    kept = (1 if remat == "none" else held) + (frames // held if held < frames else 0)
    slots = min(frames, WINDOW + config.prompts.max_cond_frames)
    tokens, v = (side // 16) ** 2, model.variant
    bank = slots * tokens * v.memory_dim * dtype.itemsize
    return {
        **sizes,
        "clips": videos * frames * side**2 * (3 + objects),
        "compute copy": whole,
        "gradients": whole + sizes["parameters"],
        "image features": 2 * part * held * _features(v, side) * dtype.itemsize,
        "image encoder": part * encoded * _encoder(model, side, dtype.itemsize),
        "memories": part * mine * kept * bank,
        "memory attention": part * mine * visited * _remembering(model, side, frames, dtype),
        "masks": part * mine * (held * _logits(config, side) + MASKS * side**2 * FLOAT32),
    }


def _features(v: Variant, side: int) -> int:
    """Elements of a frame's features at strides 16, 8 and 4."""
    c = v.hidden_dim
    return (side // 16) ** 2 * c + (side // 8) ** 2 * c // 4 + (side // 4) ** 2 * c // 8


def _weights(queries: int, keys: int, model: Sam2, itemsize: int, dropout: bool = False) -> int:
    """Bytes of the weights of one head of attention that are kept: a large one may keep none."""
    if queries * keys >= LARGE and model.kernel.name != "xla":
        return 0
    return queries * keys * (FLOAT32 + itemsize + dropout)


def _encoder(model: Sam2, side: int, itemsize: int) -> int:
    """Bytes of a frame that the trunk keeps: per token, and the weights of its attention."""
    v, total, index = model.variant, 0, 0
    for stage, depth in enumerate(v.stages):
        tokens = (side // (4 * 2**stage)) ** 2
        dim, heads = v.embed_dim * 2**stage, v.num_heads * 2**stage
        for _ in range(depth):
            window = tokens if index in v.global_blocks else v.window_spec[stage] ** 2
            weights = heads * _weights(window, window, model, itemsize) * -(-tokens // window)
            total += tokens * KEPT_BY_BLOCK * dim * itemsize + weights
            index += 1
    return total


def _remembering(model: Sam2, side: int, frames: int, dtype: Any) -> int:
    """Bytes of one object on the frame that looks at the most memories, all layers."""
    v, tokens = model.variant, (side // 16) ** 2
    memories = min(frames - 1, NUM_MEMORIES) * tokens
    memories += min(frames - 1, MAX_POINTERS) * (v.hidden_dim // v.memory_dim)
    dropout = model.attention_dropout > 0
    widths = tokens * (KEPT_BY_LAYER * v.hidden_dim + 2 * v.feedforward_dim)
    widths += memories * (2 * v.hidden_dim + v.memory_dim)  # keys before and after their code
    weights = [_weights(tokens, k, model, dtype.itemsize, dropout) for k in (tokens, memories)]
    return v.memory_layers * (widths * dtype.itemsize + sum(weights))


def _logits(config: Any, side: int) -> int:
    """Bytes of an object's logits on a frame, of all decoder passes, at a quarter of the side."""
    p = config.prompts
    passes = 3 * 2 + p.corrections if p.prob_points > 0 else 3
    return 2 * passes * (side // 4) ** 2 * FLOAT32


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
