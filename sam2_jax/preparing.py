"""From a config and a workdir to all that a run needs, checked before anything is compiled."""

import difflib
import functools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sam2_jax import base as bases
from sam2_jax import (
    checkpoint,
    cluster,
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
from sam2_jax.config_keys import flat_keys
from sam2_jax.data import catalogue, pipeline
from sam2_jax.loop import LoopSettings
from sam2_jax.model.sam2 import Sam2, init_params
from sam2_jax.records import wandb
from sam2_jax.types import UserError

LOSSES = ("loss", "loss_mask", "loss_dice", "loss_iou", "loss_class")  # of losses.total


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


def evaluated(config: Any, sets: Sequence[validation.EvalSet]) -> list[str]:
    """Names of what an evaluation finds of the model, as its row of metrics.jsonl has them."""
    found = []
    for name in [chosen.name for chosen in sets]:
        for prompt in config.eval.prompts:
            found += [validation.row_name(name, prompt, key) for key in ("J&F", "J", "F")]
        if config.eval.loss_clips:
            found += [validation.row_name(name, key) for key in LOSSES]
    return found


def check_best(config: Any, sets: Sequence[validation.EvalSet]) -> None:
    """Raises `UserError` if no evaluation finds the metric by which the best checkpoint is chosen.

    Where nothing is evaluated, or no best is kept, the metric may stay what it is by default.
    """
    best, found = config.checkpoint.best, evaluated(config, sets)
    unasked = best == LoopSettings._field_defaults["best"]
    if best in found or (unasked and not (found and config.checkpoint.keep_best)):
        return
    near = difflib.get_close_matches(best, found, n=len(found) or 1, cutoff=0.0)
    choices = f"take one of {', '.join(near)}" if near else "give --config.data.eval_root"
    raise UserError(
        f"checkpoint.best={best} is nothing that the evaluation finds: {choices}"
        + (", or checkpoint.keep_best=0 to keep none" if unasked else "")
    )


def prepare(config: Any, workdir: pathlib.Path) -> Run:
    """Checks everything that can be checked; raises `UserError` for what cannot work."""
    within = workdir / checkpoint.CHECKPOINTS
    try:
        blocking = next((p for p in (within, *within.parents) if p.is_file()), None)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be looked into ({error.strerror}: {error.filename}): take "
            "another, or mend its permissions"
        ) from error
    if blocking:
        raise UserError(f"--workdir={workdir}: {blocking} is a file, not a folder; take another")
    if config.train.wandb:
        wandb()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    recipe.check_batches(config, mesh, jax.process_count())
    model = recipe.make_config_model(config, mesh)
    optimizer, state, shapes = recipe.make_config_state(config, model)
    memory = memory_estimate.estimate(config, state, mesh)
    limit = memory_estimate.device_limit(jax.local_devices())
    warning = memory_estimate.check(memory, limit)
    parts = catalogue.make_parts(config)
    eval_sets = validation.make_eval_sets(config)
    check_best(config, eval_sets)
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


def same_everywhere(run: Run, batches: pipeline.Loader) -> None:
    """Have all processes found the same clips and the same checkpoint? To be called on each.

    Raises:
        UserError: they have not; each would deal out a stream of its own, or go on from elsewhere.
    """
    position = batches.get_state()
    found: dict[str, Any] = {f"clips of {name}": n for name, n in position["clips"].items()}
    found["sum of their names"] = position["names"]
    for chosen in run.eval_sets:
        names = [chosen.source.video(i).name for i in range(len(chosen.source))]
        about = f"{len(names)}, of names that sum to {zlib.crc32(chr(10).join(names).encode())}"
        found[f"evaluation clips {chosen.name}".strip()] = about
    found["last checkpoint"] = run.latest
    cluster.agree(found, "give all processes the same data, and one --workdir that all of them see")


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


def describe(config: Any, run: Run, origin: str) -> list[tuple[str, str]]:
    """Rows of the table at start-up: what there is, and what will be done with it.

    `origin` says where the run starts from.
    """
    groups = optim.group_sizes(run.optimizer, run.like.params)
    total = sum(elements for _, elements in groups.values())
    axes = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    precision = f"{config.train.precision}, recomputing: {config.train.remat}"
    evaluated = []
    if config.eval.loss_clips:
        evaluated = [("evaluation loss", f"on up to {config.eval.loss_clips} clips of each set")]
    if config.train.ema_decay:
        average = f"the moving average, decay {config.train.ema_decay:g}"
        evaluated.append(("evaluation of", average))
    return [
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind} ({axes})"),
        ("start", origin),
        ("input", f"{config.model.resolution} px"),
        ("precision", precision),
        ("attention", recipe.describe_attention(config, run.model)),
        ("memory", run.memory),
        ("parameters", f"{total:,}"),
        *(
            (f"  {elements:,}", run.optimizer.about[label])
            for label, (_, elements) in groups.items()
        ),
        *pipeline.describe(run.parts, config.data.draw),
        *validation.describe(run.eval_sets, config.eval.prompts),
        *evaluated,
    ]
