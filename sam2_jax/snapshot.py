"""The state of a run to and from its checkpoints, LoRA's small ones among them."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sam2_jax import base as bases
from sam2_jax import checkpoint, initial, lora, optim, partition, train


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: train.State,
    optimizer: optim.Optimizer,
    data: dict[str, Any],
    base: bases.Base | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Starts to write checkpoint `step`; of a run with a `base` the trained parameters alone.

    `settings` are the config's, as config.json has them.
    """
    params = train.split_params(state.params, optimizer)[0] if base else state.params
    rest = rest_of(state)
    checkpoint.save(manager, step, params, rest, data, state.ema, base, settings)


def rest_of(state: train.State) -> dict[str, Any]:
    """What a checkpoint's item `optimizer` holds."""
    return {"step": state.step, "moments": state.opt_state, "skipped": state.skipped}


def restore(
    workdir: pathlib.Path,
    step: int,
    like: train.State,
    optimizer: optim.Optimizer,
    frozen: train.Params | None = None,
    changes: str = "optim.*",
) -> tuple[train.State, dict[str, Any]]:
    """(state, position in the data) of checkpoint `step`, laid out as `like` says.

    `frozen` are the parameters that a LoRA run's checkpoints leave out. A moving average that the
    checkpoint lacks begins as a copy. Raises `UserError` where arrays differ; `changes` says which
    settings may be why.
    """
    wanted = like.params if frozen is None else train.split_params(like.params, optimizer)[0]
    params, rest, data = checkpoint.restore(workdir, step, wanted, rest_of(like), changes)
    params = partition.join(frozen or {}, params)
    ema = None
    if like.ema is not None:
        ema = checkpoint.restore_ema(workdir, step, like.ema)
        if ema is None:
            ema = train.begin_ema(params, optimizer)
    return train.State(rest["step"], params, rest["moments"], ema, rest["skipped"]), data


def count_anew(config: Any, state: train.State) -> train.State:
    """A restored state with which a run can go on that skips no step (`train.not_finite` "stop").

    One that skipped may have saved after a skipped step; such a count would hold this run for ever.
    """
    if config.train.not_finite != "stop":
        return state
    step: Any = state.step
    # From numpy, so that devices of other processes get it too
    return state._replace(skipped=jax.device_put(np.zeros((), np.int32), step.sharding))


def load_base(config: Any, like: train.Params) -> tuple[train.Params, bases.Base]:
    """The weights of `checkpoint.init_from` that LoRA adapts, and what is to be known of them."""
    like, _ = partition.split(like, lambda path: not lora.is_lora(path))
    found = initial.check_init(config.checkpoint.init_from, like).resolve()
    params = initial.load_init(found, like)
    return params, bases.Base(str(found), bases.fingerprint(params), config.lora.rules)


def frozen_of_base(
    config: Any,
    workdir: pathlib.Path,
    step: int,
    params: train.Params,
    optimizer: optim.Optimizer,
) -> train.Params:
    """What checkpoint `step` leaves out, of `params`; `UserError` if it was made upon others."""
    if before := bases.read(workdir / checkpoint.CHECKPOINTS / str(step)):
        bases.check(before, params, config.checkpoint.init_from, "checkpoint.init_from")
    return train.split_params(params, optimizer)[1]


def with_adapters(config: Any, params: train.Params, like: train.Params) -> train.Params:
    """Parameters with new adapters beside their kernels, laid out as `like` says."""
    wanted, _ = partition.split(like, lora.is_lora)
    layout = jax.tree.map(lambda x: x.sharding, wanted)
    shapes = jax.eval_shape(lambda: params)
    init = functools.partial(lora.init, shapes=shapes, rules=config.lora.rules)
    return partition.join(params, jax.jit(init, out_shardings=layout)(jax.random.key(config.seed)))
