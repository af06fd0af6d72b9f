"""Trains SAM 2.1 on video; started again with the same --workdir it goes on from its checkpoint.

  python scripts/train.py --config=configs/smoke.py
  python scripts/train.py --config=configs/davis.py:tiny --config.data.root=DAVIS --workdir=runs/a
  python scripts/train.py --config=configs/davis.py:nano --config.train.steps=500

VARIANT after the colon: nano (for a CPU), tiny, small, base_plus or large. Any key of
configs/default.py can be set as --config.a.b=value. The workdir gets config.json, metrics.jsonl,
overlay.png, loss.png, tensorboard/ and checkpoints/.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`

import functools
import os
from typing import Any, NamedTuple

import jax
from absl import flags
from jax._src.clusters import GceTpuCluster  # JAX has no public way to ask before connecting
from ml_collections import config_flags

from sam2_jax import base as bases
from sam2_jax import checkpoint, loop, lora, optim, plots, sharding, snapshot, train, validation
from sam2_jax import config as config_lib
from sam2_jax.data import catalogue, pipeline
from sam2_jax.model.sam2 import Sam2, init_params, make_sam2
from sam2_jax.types import UserError

_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run lives; empty: runs/CONFIG-VARIANT.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", "", "HOST:PORT of process 0; SLURM, Open MPI 4 and TPUs need no flags."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of this run.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
CACHE = pathlib.Path.home() / ".cache" / "sam2_jax"
WEIGHTS = "https://github.com/facebookresearch/sam2#model-description"
# Set by launchers to the number of processes. Not all versions tell JAX where process 0 is.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def has_peers() -> bool:
    """Whether a launcher, GKE or the metadata of a Cloud TPU VM tells of other processes."""
    if any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS):
        return True
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    try:
        return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1
    except OSError as e:
        raise UserError(
            f"cannot ask Cloud TPU's metadata server for other hosts ({type(e).__name__}): set "
            "TPU_SKIP_MDS_QUERY=1 if there are none, else give --coordinator_address"
        ) from e


def connect() -> None:
    """Joins the other processes of the run, if it has any."""
    if _COORDINATOR.value:
        if _PROCESSES.value is None or _PROCESS.value is None:
            raise UserError("--coordinator_address needs --num_processes and --process_id too")
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    elif _PROCESSES.value is not None or _PROCESS.value is not None:
        raise UserError("--num_processes and --process_id need --coordinator_address=HOST:PORT")
    elif has_peers():
        try:
            jax.distributed.initialize()
        except ValueError as e:
            raise UserError(
                f"there are other processes, but JAX does not find them ({e}): give "
                "--coordinator_address, --num_processes and --process_id"
            ) from e


def say(text: str) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def table(rows: list[tuple[str, str]]) -> None:
    """Prints two aligned columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


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


def prepare(config: Any) -> Run:
    """Checks everything that can be checked; raises `UserError` for what cannot work."""
    workdir = pathlib.Path(
        _WORKDIR.value
        or config_lib.default_workdir(
            config_flags.get_config_filename(flags.FLAGS["config"]), config
        )
    )
    if blocking := next((p for p in (workdir, *workdir.parents) if p.is_file()), None):
        raise UserError(f"--workdir={workdir}: {blocking} is a file, not a folder; take another")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    for part in config.data.mixture.values() or [config.data]:
        sharding.check_batch_size(
            part.batch_size, mesh, jax.process_count(), config.train.accumulate
        )
    m = config.model
    model = make_sam2(
        m.variant, m.resolution, m.version, m.attention_dropout, m.dropout, m.drop_path
    )
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    optimizer, with_adapters = train.make_config_optimizer(config, shapes)
    begin = functools.partial(train.init_state, optimizer=optimizer, ema=config.train.ema_decay > 0)
    state = jax.eval_shape(begin, with_adapters)
    parts = catalogue.make_parts(config)
    eval_sets = validation.make_eval_sets(config)
    latest = checkpoint.latest_step(workdir)
    if latest is not None:
        checkpoint.check_same_model(workdir, config.to_dict())
    if config.checkpoint.init_from and (latest is None or config.lora.rules):
        checkpoint.check_init(config.checkpoint.init_from, shapes)
    return Run(
        workdir,
        mesh,
        model,
        optimizer,
        sharding.with_shardings(state, train.state_shardings(state, mesh)),
        parts,
        eval_sets,
        latest,
    )


def start(
    config: Any, run: Run, batches: pipeline.Loader
) -> tuple[train.State, str, bases.Base | None]:
    """(state, where it comes from: a checkpoint, other weights, or chance; base of LoRA)."""
    like, base = run.like, None
    if config.lora.rules:
        adapted, base = snapshot.load_base(config, like.params)
    if run.latest is not None:
        for change in checkpoint.changed_keys(run.workdir, config_lib.flat_keys(config)):
            say(f"note: changed since the last start: {change}")
        frozen = None
        if base:
            frozen = snapshot.frozen_of_base(
                config, run.workdir, run.latest, adapted, run.optimizer
            )
        state, data = snapshot.restore(run.workdir, run.latest, like, run.optimizer, frozen)
        batches.set_state(data)
        return state, f"checkpoint of step {run.latest}", base
    layout = train.state_shardings(like, run.mesh)
    if config.checkpoint.init_from:
        origin = config.checkpoint.init_from
        if base:
            params = snapshot.with_adapters(config, adapted, like.params)
        else:
            params = checkpoint.load_init(origin, like.params)
    else:
        origin = "random weights"
        say(
            f"warning: starting from random weights; official ones are at {WEIGHTS}, to be given "
            "as --config.checkpoint.init_from=FILE.pt"
        )
        init = jax.jit(functools.partial(init_params, run.model), out_shardings=layout.params)
        params = init(jax.random.key(config.seed))
    begin = functools.partial(train.init_state, optimizer=run.optimizer, ema=like.ema is not None)
    return jax.jit(begin, out_shardings=layout)(params), origin, base


def introduce(config: Any, run: Run, origin: str) -> None:
    """Prints the table at start-up."""
    groups = optim.group_sizes(run.optimizer, run.like.params)
    total = sum(elements for _, elements in groups.values())
    say(f"{run.workdir}: {config.model.variant} {config.model.version}")
    axes = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    precision = f"{config.train.precision}, recomputing: {config.train.remat}"
    average = []
    if config.train.ema_decay:
        average = [("evaluation of", f"the moving average, decay {config.train.ema_decay:g}")]
    table(
        [
            ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind} ({axes})"),
            ("start", origin),
            ("input", f"{config.model.resolution} px"),
            ("precision", precision),
            ("parameters", f"{total:,}"),
            *(
                (f"  {elements:,}", run.optimizer.about[label])
                for label, (_, elements) in groups.items()
            ),
            *pipeline.describe(run.parts, config.data.draw),
            *validation.describe(run.eval_sets, config.eval.prompts),
            *average,
        ]
    )


def main(config: Any) -> None:
    """One run, from whatever the workdir holds to `train.steps`."""
    connect()
    run = prepare(config)
    batches = catalogue.make_train_loader(
        config, run.parts, jax.process_index(), jax.process_count()
    )
    try:
        train_on(config, run, batches)
    finally:
        batches.close()


def train_on(config: Any, run: Run, batches: pipeline.Loader) -> None:
    """`main` with the loader's iterator open."""
    state, origin, base = start(config, run, batches)
    introduce(config, run, origin)
    if run.latest is not None and run.latest >= config.train.steps:
        say(f"nothing to do: step {run.latest} of {config.train.steps} is done")
        return
    if jax.process_index() == 0:
        checkpoint.write_config(run.workdir, config_lib.to_json(config))

    def draw() -> None:
        if jax.process_index() == 0:
            plots.loss_curves(run.workdir / "metrics.jsonl", run.workdir / "loss.png")

    evaluate = None
    if run.eval_sets:
        validate = functools.partial(
            validation.validate, config, run.model, run.eval_sets, run.workdir
        )
        merge = jax.jit(functools.partial(lora.merge, rules=config.lora.rules))

        def evaluation(params: train.Params, step: int) -> dict[str, float]:
            return validate(merge(params) if config.lora.rules else params, step)

        evaluate = evaluation

    step_fn = train.make_config_step(config, run.model, run.optimizer, run.mesh)
    say("compiling the step, which takes minutes the first time ...")
    with checkpoint.make_manager(run.workdir, config.checkpoint.keep) as manager:

        def save(step: int, state: train.State) -> None:
            snapshot.save(manager, step, state, run.optimizer, batches.get_state(), base)
            draw()

        loop.run_loop(
            state,
            train.jit_step(step_fn, run.like, run.mesh),
            batches,
            jax.random.key(config.seed),
            loop.make_loop_settings(config),
            run.mesh,
            workdir=run.workdir,
            save=save,
            evaluate=evaluate,
            source_of=batches.source_of if len(run.parts) > 1 else None,
        )
        manager.wait_until_finished()
    draw()
    say(f"done: see overlay.png, loss.png and metrics.jsonl in {run.workdir}")


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    config_lib.run(main)
