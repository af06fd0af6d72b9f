"""From a config and a workdir to all that a run needs, checked before anything is compiled."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam2_jax import base as bases
from sam2_jax import (
    checkpoint,
    initial,
    memory_estimate,
    optim,
    recipe,
    resume,
    sharding,
    snapshot,
    train,
    validation,
)
from sam2_jax.config_checks import flat_keys
from sam2_jax.data import catalogue, pipeline
from sam2_jax.model.sam2 import Sam2, init_params
from sam2_jax.records import wandb
from sam2_jax.types import UserError


class Run(NamedTuple):
    """What a config becomes, before anything is compiled or written."""

    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: Sam2
    optimizer: optim.Optimizer
    like: train.State  # shapes with shardings
    parts: list[pipeline.Part]  # what is trained on
    eval_sets: list[validation.EvalSet]
    latest: int | None  # step to go on from
    memory: str = ""  # what a device is to hold, estimated
    warning: str = ""  # where that may be too much


def workdir_of(text: str) -> pathlib.Path:
    """The folder that --workdir names; `UserError` for an address of a bucket.

    Run folders are locked, cut and replaced as files of a file system are. As a path the address
    would be a folder `gs:` in the one where this is started.
    """
    scheme, is_address, _ = text.partition("://")
    if is_address:
        raise UserError(
            f"--workdir={text} is no folder: a run can be where files can, on a disk or a network "
            "file system; mount the bucket as one (such as gcsfuse for gs, mount-s3 for s3) and "
            f"name the mounted folder, or train on a disk and copy the run to {scheme}:// after"
        )
    return pathlib.Path(text)


def prepare(config: Any, workdir: pathlib.Path) -> Run:
    """Checks everything that can be checked; raises `UserError` for what cannot work."""
    if blocking := next((p for p in (workdir, *workdir.parents) if p.is_file()), None):
        raise UserError(f"--workdir={workdir}: {blocking} is a file, not a folder; take another")
    if config.train.wandb:
        wandb()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    for part in config.data.mixture.values() or [config.data]:
        sharding.check_batch_size(
            part.batch_size, mesh, jax.process_count(), config.train.accumulate
        )
    model = recipe.make_config_model(config, mesh)
    optimizer, state, shapes = recipe.make_config_state(config, model)
    memory = memory_estimate.estimate(config, model, state, mesh)
    limit = memory_estimate.device_limit(jax.local_devices())
    warning = memory_estimate.check(memory, limit)
    parts = catalogue.make_parts(config)
    eval_sets = validation.make_eval_sets(config)
    latest = checkpoint.latest_step(workdir)
    if latest is not None:
        resume.check(workdir, flat_keys(config))
    if config.checkpoint.init_from and (latest is None or config.lora.rules):
        initial.check_init(config.checkpoint.init_from, shapes)
    return Run(
        workdir,
        mesh,
        model,
        optimizer,
        sharding.with_shardings(state, train.state_shardings(state, mesh)),
        parts,
        eval_sets,
        latest,
        memory_estimate.describe(memory),
        warning,
    )


def same_everywhere(batches: pipeline.Loader) -> None:
    """Do all processes train on the same clips? To be called on each of them.

    Raises:
        UserError: they do not; each would deal out a stream of its own.
    """
    if jax.process_count() == 1:
        return
    own = batches.get_state()
    numbers = [own["names"], *own["clips"].values()]
    found = np.asarray(multihost_utils.process_allgather(np.array(numbers, np.uint32)))
    if others := np.flatnonzero((found != found[0]).any(1)).tolist():
        raise UserError(
            f"process {others[0]} finds other training clips than process 0 "
            f"({found[others[0], 1:].tolist()} and {found[0, 1:].tolist()} clips, or other names): "
            "give all processes the same data"
        )


def start(
    config: Any, run: Run, batches: pipeline.Loader
) -> tuple[train.State, str, bases.Base | None]:
    """(state, where it comes from: a checkpoint, other weights, or chance; base of LoRA)."""
    like, base = run.like, None
    if config.lora.rules:
        adapted, base = snapshot.load_base(config, like.params)
    if run.latest is not None:
        frozen = None
        if base:
            frozen = snapshot.frozen_of_base(
                config, run.workdir, run.latest, adapted, run.optimizer
            )
        changed = resume.changed_keys(run.workdir, flat_keys(config))
        changes = resume.optimizer_changes(changed)
        state, data = snapshot.restore(
            run.workdir, run.latest, like, run.optimizer, frozen, changes
        )
        batches.set_state(data)
        return state, f"checkpoint of step {run.latest}", base
    layout = train.state_shardings(like, run.mesh)
    if config.checkpoint.init_from:
        origin = config.checkpoint.init_from
        if base:
            params = snapshot.with_adapters(config, adapted, like.params)
        else:
            params = initial.load_init(origin, like.params)
    else:
        origin = "random weights"
        init = jax.jit(
            functools.partial(init_params, run.model),
            out_shardings=layout.params,
            # It runs once: on a CPU, optimising it takes three times as long as compiling it
            compiler_options={"xla_backend_optimization_level": 0}
            if run.mesh.devices.flat[0].platform == "cpu"
            else None,
        )
        params = init(jax.random.key(config.seed))
    begin = functools.partial(train.init_state, optimizer=run.optimizer, ema=like.ema is not None)
    return jax.jit(begin, out_shardings=layout)(params), origin, base
