"""The true train step of a config, compiled for a machine, and what the compiler says of it.

Shapes alone: no parameter is made, no data read, nothing run. The step is the one that
scripts/train.py runs, from `recipe.make_config_step` through `train.jit_step`, with donated state.
"""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sam2_jax import hlo, optim, recipe, sharding, topology, train
from sam2_jax.benchmarks import ours, plans
from sam2_jax.memory_estimate import heaviest_source, sharded_bytes
from sam2_jax.model.sam2 import Sam2
from sam2_jax.topology import Target
from sam2_jax.types import Batch, UserError

Report = dict[str, Any]  # of JSON's types
_OVER = re.compile(r"required for HLO \w+ \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def batch_shapes(config: Any, videos: int) -> Batch:
    """Of a batch of the heaviest source."""
    _, source = heaviest_source(config)
    t, o, side = source.num_frames, source.max_objects, config.model.resolution
    images: Any = jax.ShapeDtypeStruct((videos, t, side, side, 3), jnp.uint8)
    masks: Any = jax.ShapeDtypeStruct((videos, t, o, side, side), bool)
    valid: Any = jax.ShapeDtypeStruct((videos, o), bool)
    return Batch(images, masks, valid)


def plan_names(config: Any) -> list[str]:
    """Plans that training draws, of those that have names."""
    p, frames = config.prompts, heaviest_source(config)[1].num_frames
    conds = range(1, min(p.max_cond_frames, frames, plans.MOST) + 1)
    most = min(p.max_corrected_frames, frames, plans.MOST)
    found = [] if frames == 1 or p.prob_points == 1 else [f"mask{c}" for c in conds]
    if frames == 1 or p.prob_points > 0:
        kinds = ["point"] * (p.prob_box < 1) + ["box"] * (p.prob_box > 0)
        found += [f"{k}{c}{e}" for k in kinds for c in conds for e in range(c, most + 1)]
    return found


def work_by_plan(config: Any) -> dict[str, int]:
    """Operations of a step, forward and backward, of all devices; nothing recomputed counted.

    Two for each multiplication with its addition, of products and convolutions, over the jaxpr.
    """
    source = heaviest_source(config)[1]
    frames, corrections = source.num_frames, config.prompts.corrections
    given = {name: plans.make(name, frames, corrections) for name in plan_names(config)}
    alone = config.copy_and_resolve_references().unlock()
    for key in ("num_frames", "max_objects", "batch_size"):
        alone.data[key] = source[key]
    found = ours.count(alone, given)
    return {name: sum(work.total for work in scopes.values()) for name, scopes in found.items()}


class Parts(NamedTuple):
    """What a step is made of, all shapes."""

    mesh: Mesh
    model: Sam2
    optimizer: optim.Optimizer
    state: train.State


def make_parts(config: Any, devices: Sequence[Any]) -> Parts:
    """From a config and devices, which may be such that are only compiled for.

    As in training every host is a process that loads videos.

    Raises:
        UserError: the mesh does not fit the devices, or not the batch, or attention not either.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices)
    recipe.check_batches(config, mesh, len({device.process_index for device in devices}))
    model = recipe.make_config_model(config, mesh)
    optimizer, state, _ = recipe.make_config_state(config, model)
    return Parts(mesh, model, optimizer, state)


def compile_step(config: Any, parts: Parts, target: Target) -> Any:
    """The compiled step.

    Raises:
        JaxRuntimeError, of jax.errors: the compiler gives up.
        NotImplementedError: JAX has no form of an operation for the target.
    """
    step = recipe.make_config_step(config, parts.model, parts.optimizer, parts.mesh)
    batch = batch_shapes(config, heaviest_source(config)[1].batch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with topology.answering_for(target.devices[0]):
        lowered = train.jit_step(step, parts.state, parts.mesh).lower(parts.state, batch, key)
    return lowered.compile(compiler_options=target.options or None)


def report(config: Any, target: Target, count_work: bool = True) -> Report:
    """What `scripts/compile_report.py` prints; bytes are per device.

    Where the compiler refuses since memory does not suffice, `fits` is false, `peak_bytes` is what
    it says it would need, and what only a compiled program has is null. `bytes_accessed` and
    `optimal_seconds` are the compiler's own and count the body of a loop once; `collectives` and
    `estimated_seconds` multiply loops out, but for `loops_counted_once`, whose turns are not known.
    `estimated_seconds` leaves out `kernels_without_estimate` calls of kernels a step.
    """
    name, source = heaviest_source(config)
    parts = make_parts(config, target.devices)
    began = time.monotonic()
    compiled, needed = None, 0
    try:
        compiled = compile_step(config, parts, target)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
        needed = _needed_bytes(str(e))
        if not needed:
            raise UserError(
                f"the compiler for {target.name} cannot compile this step: {str(e)[:300]}"
            ) from e
    seconds = round(time.monotonic() - began, 1)
    found: Report = {
        "topology": target.name,
        "devices": len(target.devices),
        "device_kind": target.kind,
        "mesh": dict(parts.mesh.shape),
        "variant": config.model.variant,
        "resolution": config.model.resolution,
        "source": name,
        "frames": source.num_frames,
        "objects": source.max_objects,
        "batch_size": source.batch_size,
        "accumulate": config.train.accumulate,
        "precision": config.train.precision,
        "reduce_precision": config.train.reduce_precision,
        "remat": config.train.remat,
        "attention": recipe.describe_attention(config, parts.model),
    }
    found |= _memory(compiled, needed, target)
    found["state_bytes"] = sharded_bytes(parts.state, parts.mesh)
    found["flops_by_plan"] = work_by_plan(config) if count_work else {}
    found |= _program(compiled, target)
    kinds = found["collectives"]
    found["sent_bytes"] = None if kinds is None else hlo.sent(kinds)
    found["least_collective_bytes"] = least_collective_bytes(config, parts)
    return found | {"compile_seconds": seconds}


def _memory(compiled: Any, needed: int, target: Target) -> Report:
    """What a device must hold; `alias` are results that take the place of arguments."""
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes: dict[str, int | None] = dict.fromkeys(names)
    peak = needed
    if compiled is not None:
        stats = compiled.memory_analysis()
        sizes = {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
        peak = sum(size or 0 for size in sizes.values()) - 2 * (sizes["alias"] or 0)
    return {
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "peak_bytes": peak,
        "hbm_bytes": target.hbm_bytes,
        "fits": None if target.usable_bytes is None else not needed and peak <= target.usable_bytes,
    }


def _program(compiled: Any, target: Target) -> Report:
    """What a compiled program tells of its time and of what it sends."""
    names = (
        "bytes_accessed",
        "collectives",
        "optimal_seconds",
        "estimated_seconds",
        "kernels_without_estimate",
        "loops_counted_once",
    )
    if compiled is None:
        return dict.fromkeys(names)
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, Sequence) else costs
    optimal = costs.get("optimal_seconds", 0.0)
    counted = hlo.totals(compiled.as_text())
    seconds = counted.cycles / target.clock if target.clock and counted.cycles else None
    values = (
        int(costs["bytes accessed"]) if "bytes accessed" in costs else None,
        hlo.by_kind(counted),
        optimal if optimal > 0 else None,  # it is negative where an operation has no estimate
        seconds,
        counted.kernels,
        counted.unknown_loops,
    )
    return dict(zip(names, values, strict=True))


def _needed_bytes(message: str) -> int:
    """What a compiler that gave up for want of memory says it needs; 0: it had another reason."""
    match = _OVER.search(message)
    if match is None:
        return 0
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return int(float(number) * _UNITS[unit])


def least_collective_bytes(config: Any, parts: Parts) -> int:
    """Bytes a step that no layout of this mesh can do without, counted as `hlo.sent` does.

    Over `fsdp` one gather of the compute copy and one reduce-scatter of its gradients; over `data`
    and `model` one all-reduce of the shard. What is too small to shard is all-reduced whole.
    Gathers are in `train.precision`, sums in `train.reduce_precision`. Of parameters that are not
    trained there is no gradient. Features of frames that are gathered over `model` are not in it.
    """
    mesh = parts.mesh
    fsdp, copies = mesh.shape["fsdp"], mesh.shape["data"] * mesh.shape["model"]
    params = parts.state.params

    def leaves(tree: Any, precision: str) -> list[Any]:
        copy = jax.eval_shape(lambda p: train.compute_copy(p, jnp.dtype(precision)), tree)
        return jax.tree.leaves(copy)

    total = 0
    for leaf in leaves(params, config.train.precision):
        if any(sharding.leaf_spec(leaf.shape, fsdp)):
            total += leaf.size * leaf.dtype.itemsize
    trained, _ = train.split_params(params, parts.optimizer)
    for leaf in leaves(trained, config.train.reduce_precision):
        size = leaf.size * leaf.dtype.itemsize
        if any(sharding.leaf_spec(leaf.shape, fsdp)):
            total += size + (2 * size // fsdp if copies > 1 else 0)
        elif mesh.size > 1:
            total += 2 * size
    return total
