"""Trains SAM 2.1 on video; started again with the same --workdir it goes on from its checkpoint.

  python scripts/train.py --config=configs/smoke.py
  python scripts/train.py --config=configs/davis.py:tiny --config.data.root=DAVIS --workdir=runs/a
  python scripts/train.py --config=configs/davis.py:nano --config.train.steps=500

VARIANT after the colon: nano (for a CPU), tiny, small, base_plus or large. Any key of
configs/default.py can be set as --config.a.b=value. The workdir, a folder of a disk or a network
file system, gets

  config.json                     the settings; what has changed is shown when a run goes on
  metrics.jsonl, tensorboard/     every logged number, pictures, a trace (train.profile_steps)
  overlay.png, overlay-SET.png    predicted and true outlines, and the prompts, of each evaluation
  loss.png                        curves
  checkpoints/N/                  of step N; best.json says which evaluation was best
  worst.json                      clips whose losses stood out most
  bad/N/report.json               of a step that was not finite, for --replay

SIGTERM and Ctrl-C save, and end with exit status 75: the same command goes on. What the user can
mend is one line 'error: ...' and exit status 2.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`

from sam2_jax import startup

if __name__ == "__main__":
    startup.begin()

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from sam2_jax import (
    checkpoint,
    cluster,
    curves,
    eval_loss,
    judging,
    loop,
    lora,
    preparing,
    recipe,
    replay,
    reports,
    resume,
    snapshot,
    stopping,
    train,
    validation,
)
from sam2_jax import config as config_lib
from sam2_jax.data import catalogue, pipeline
from sam2_jax.types import Batch, UserError

_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run lives; empty: runs/CONFIG-VARIANT.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", "", "HOST:PORT of process 0; SLURM, Open MPI 4 and TPUs need no flags."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of this run.")
_REPLAY = flags.DEFINE_string(
    "replay", "", "report.json of a step that was not finite: repeats it, without --config."
)
_PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
LEFT = (
    ("overlay*.png", "predicted and true outlines on evaluation clips, and the prompts"),
    ("loss.png", "curves"),
    ("metrics.jsonl", "every logged number"),
    ("best.json", "step and value of the best evaluation"),
    ("worst.json", "clips whose losses stood out most"),
    ("config.json", "the settings"),
    ("checkpoints", "to evaluate, convert, or go on from"),
    ("tensorboard", "the same numbers, pictures and traces, for tensorboard --logdir"),
)  # globs, and what they are
WEIGHTS = "https://github.com/facebookresearch/sam2#model-description"


def connect() -> None:
    """Joins the other processes of the run, if it has any."""
    cluster.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Among the other processes of the run, which end together."""
    connect()
    if jax.process_count() == 1:
        stopping.end_until_asked_otherwise()
    with cluster.ending_together():
        yield


def say(text: str) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def table(rows: list[tuple[str, str]]) -> None:
    """Prints two aligned columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


def prepare(config: Any) -> preparing.Run:
    """`preparing.prepare` in the workdir that the flags name."""
    workdir = _WORKDIR.value
    if not workdir:
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = config_lib.default_workdir(path, config)
    return preparing.prepare(config, preparing.workdir_of(workdir))


def introduce(config: Any, run: preparing.Run, origin: str) -> None:
    """Prints the table at start-up."""
    say(f"{run.workdir}: {config.model.variant} {config.model.version}")
    table(preparing.describe(config, run, origin))
    if run.warning:
        say(run.warning)


def main(config: Any) -> int | None:
    """One run, from whatever the workdir holds to `train.steps`.

    Exit status 75 if it was asked to end (SIGTERM, SIGINT): what was done is saved, and the same
    command goes on.
    """
    flat = config_lib.flat_keys(config) | {"--workdir": _WORKDIR.value, "--replay": _REPLAY.value}
    cluster.agree(flat, "give all processes the same --config and the same options")
    if _REPLAY.value:
        return repeat(config, pathlib.Path(_REPLAY.value))
    run = prepare(config)
    with checkpoint.writing(run.workdir):
        held = stopping.take(run.workdir)
    if checkpoint.latest_step(run.workdir) != run.latest:
        # Until now it may have been another run's, which has ended
        run = prepare(config)
    batches = catalogue.make_train_loader(
        config, run.parts, jax.process_index(), jax.process_count()
    )
    try:
        preparing.same_everywhere(run, batches)
        train_on(config, run, batches)
    except loop.Stopped as stopped:
        say(f"{stopped}; the same command goes on from there")
        return stopping.STOPPED
    finally:
        batches.close()
        if held:
            held.close()
    return None


def train_on(config: Any, run: preparing.Run, batches: pipeline.Loader) -> None:
    """`main` with the loader's iterator open."""
    loss_of = eval_loss.make_eval_loss(config, run.model, run.eval_sets, run.mesh)
    if run.latest is not None:
        for key, change in resume.changed_keys(run.workdir, config_lib.flat_keys(config)).items():
            say(f"note: changed since checkpoint {run.latest}: {key}: {change}")
    elif not config.checkpoint.init_from:
        say(
            f"warning: starting from random weights; official ones are at {WEIGHTS}, to be given "
            "as --config.checkpoint.init_from=FILE.pt"
        )
    state, origin, base = preparing.start(config, run, batches)
    state = snapshot.count_anew(config, state)
    introduce(config, run, origin)
    latest = run.latest or 0
    owed = run.eval_sets and latest and loop.owes_evaluation(run.workdir, latest)
    if latest >= config.train.steps and not (owed and latest == config.train.steps):
        say(f"nothing to do: step {run.latest} of {config.train.steps} is done")
        return
    settings = config.to_dict()
    picture, evaluate, request = None, None, stopping.Request()
    if jax.process_index() == 0:
        picture = curves.Curves(run.workdir)
        with checkpoint.writing(run.workdir):
            resume.write_config(run.workdir, config_lib.to_json(config))
    if run.eval_sets:
        validate = functools.partial(
            validation.validate, config, run.model, run.eval_sets, run.workdir
        )
        merge = jax.jit(functools.partial(lora.merge, rules=config.lora.rules))

        def evaluation(state: train.State, step: int) -> dict[str, float]:
            with checkpoint.writing(run.workdir):
                manager.wait_until_finished()  # an evaluation may end this process
            with request.saved():
                params = train.best_params(state)
                if config.lora.rules:
                    params = merge(params)
                return validate(params, step, request.check) | loss_of(params, step)

        evaluate = evaluation

    def bad_step(
        step: int, state: train.State, batch: Batch, values: dict[str, float]
    ) -> UserError:
        clips = batches.clips_of(step - 1)
        with checkpoint.writing(run.workdir):
            checkpoint.finish(manager)
            return replay.save(
                run.workdir, step, state, batch, values, clips, sys.argv[1:], settings
            )

    step_fn = recipe.make_config_step(config, run.model, run.optimizer, run.mesh)
    say("compiling the step, which takes minutes the first time ...")
    with checkpoint.opened(run.workdir, checkpoint.make_keep(config)) as manager:

        def save(step: int, state: train.State) -> None:
            with checkpoint.writing(run.workdir):
                data = batches.get_state()
                snapshot.save(manager, step, state, run.optimizer, data, base, settings)
                if picture:
                    picture.draw()

        def judge(step: int, row: dict[str, float]) -> None:
            with checkpoint.writing(run.workdir):
                judging.judge(manager, step, row)

        try:
            loop.run_loop(
                state,
                train.jit_step(step_fn, run.like, run.mesh),
                batches,
                jax.random.key(config.seed),
                loop.make_loop_settings(config),
                run.mesh,
                workdir=run.workdir,
                hooks=loop.Hooks(
                    save,
                    evaluate,
                    judge if config.checkpoint.keep_best else None,
                    batches.source_of if len(run.parts) > 1 else None,
                    batches.clips_of,
                    request,
                    bad_step,
                ),
            )
        except loop.Stopped:
            with checkpoint.writing(run.workdir):
                manager.wait_until_finished()  # it says that its step is saved
            raise
    if picture:
        with checkpoint.writing(run.workdir):
            picture.draw(at_once=True)
    summarise(run.workdir)


def summarise(workdir: pathlib.Path) -> None:
    """Prints what a finished run leaves, and where."""
    say(f"done: {workdir}")
    table([(str(path), what) for glob, what in LEFT for path in sorted(workdir.glob(glob))])


def repeat(config: Any, path: pathlib.Path) -> None:
    """--replay: one step again, checking for NaN."""
    report = reports.read_report(path)
    reports.processes_of(path, report, jax.process_count())
    run = prepare(config)
    say(f"repeating step {report['step']}, not finite: {', '.join(report['not_finite'])}")
    say(f"clips: {', '.join(report['clips'])}")
    changed = resume.differences(report["settings"], config_lib.flat_keys(config))
    for key, change in changed.items():
        say(f"note: changed since that step: {key}: {change}")
    if not report.get("exact", True):
        say("note: the parameters are those after the step that followed, which was finite")
    step_fn = recipe.make_config_step(config, run.model, run.optimizer, run.mesh)
    again = functools.partial(
        replay.repeat, path, step_fn, run.like, run.mesh, jax.random.key(config.seed)
    )
    try:
        metrics = again()
    except FloatingPointError as error:
        say(
            f"{error}\nonce more, operation by operation, to find the first: this takes minutes ..."
        )
        try:
            again(loops=True)
        except jax.errors.JaxRuntimeError as second:  # it takes more memory
            say(f"that could not be done: {second}")
        raise
    table([(name, f"{value:g}") for name, value in metrics.items()])
    say("no operation made a NaN; an infinity is among the numbers above, or it was the hardware")


if __name__ == "__main__":
    checkpoint.quiet()
    config_lib.run(main, joined)
