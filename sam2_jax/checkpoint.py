"""Checkpoints of a run (Orbax) and what else makes a workdir resumable.

The checkpoint of step N, that is after N updates, is `checkpoints/N/` with the items `params`,
`optimizer` (step count and moments), `data` (the loader's position, JSON), `config` (the settings
that it was made with, JSON, as config.json has them; see resume.py), `sums` (by which damage is
noticed, see integrity.py) and, of runs that have one, `ema` (the moving average of the trained
parameters). A LoRA run's `params` are the trained ones alone; its item `lora` says where the others
are (see base.py).
"""

import contextlib
import errno
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers as managers

from sam2_jax import arrays, integrity, judging
from sam2_jax import base as bases
from sam2_jax.types import UserError

Tree = Any
CHECKPOINTS = "checkpoints"
# Where those go that are no longer kept, in one rename: half deleted they would look like others
TRASH = "deleted"
EMA, DATA, CONFIG = "ema", "data", "config"  # items of a checkpoint
# How the system calls a disk, or a user's share of it, that is full
FULL = {errno.ENOSPC: "No space left", errno.EDQUOT: "Disk quota exceeded"}


class Unwritten(UserError):
    """Something of a workdir could not be written."""


class NoRoom(OSError):
    """The disk has less room than a checkpoint takes: known before anything is begun."""


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of absl's log tells something: Orbax's are of what it raises, too, or worse.

    (That a checkpoint has no figures of an evaluation; pages about one error of a full disk.)
    """
    return "orbax" not in pathlib.Path(record.pathname).parts


def quiet() -> None:
    """Leaves out of absl's log what is no news (see `is_news`), from now on: for scripts."""
    absl_logging.get_absl_logger().addFilter(is_news)


class Keep(NamedTuple):
    """Which checkpoints stay."""

    last: int
    every: int = 0  # and those of these steps' multiples; 0: none
    best: int = 0  # and so many of the best by a metric of the evaluation
    metric: str = "eval/J&F"
    lowest: bool = False  # the best is the lowest, of losses


def make_keep(config: Any) -> Keep:
    """From the config's `checkpoint` section."""
    c = config.checkpoint
    return Keep(c.keep, c.keep_every, c.keep_best, c.best, c.best_is_lowest)


def make_manager(workdir: pathlib.Path, keep: Keep) -> ocp.CheckpointManager:
    """Orbax manager of `workdir/checkpoints`, asynchronous; what `keep` does not name goes.

    Raises `UserError` where the metrics of one that is there are damaged: Orbax reads them all.
    """
    for step in steps_of(workdir):
        judging.check(workdir / CHECKPOINTS / str(step))
    worst = math.inf if keep.lowest else -math.inf

    def value(metrics: dict[str, float]) -> float:
        # A checkpoint of an earlier start may have been judged by another metric
        found = metrics.get(keep.metric, worst)
        return worst if math.isnan(found) else found

    policies: list[managers.PreservationPolicy] = [managers.LatestN(keep.last)]
    if keep.every:
        policies.append(managers.EveryNSteps(keep.every))
    if keep.best:
        best = managers.BestN(
            get_metric_fn=value,
            reverse=keep.lowest,
            n=keep.best,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        best_fn=value if keep.best else None,
        best_mode="min" if keep.lowest else "max",
        cleanup_tmp_directories=True,
        todelete_subdir=TRASH,
    )
    folder = (workdir / CHECKPOINTS).resolve()
    if jax.process_index() == 0:  # what cannot be written to is told of before anything is trained
        (folder / TRASH).mkdir(parents=True, exist_ok=True)
    empty_trash(folder)
    return ocp.CheckpointManager(folder, options=options)


def empty_trash(folder: pathlib.Path) -> None:
    """Deletes the checkpoints of a folder that are no longer kept, also of an earlier start."""
    if jax.process_index() == 0 and (folder / TRASH).is_dir():
        shutil.rmtree(folder / TRASH)


@contextlib.contextmanager
def opened(workdir: pathlib.Path, keep: Keep) -> Iterator[ocp.CheckpointManager]:
    """`make_manager`, closed at the end, when all that it began to write is written.

    Raises `Unwritten` where that fails, see `ending`; not for what else fails within.
    """
    with writing(workdir):
        manager = make_manager(workdir, keep)
    first = None
    try:
        yield manager
    except BaseException as error:
        first = error
        raise
    finally:
        with ending(workdir, first):
            manager.close()
            empty_trash(pathlib.Path(manager.directory))


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Within it what cannot be written is `Unwritten`, which names the last good checkpoint.

    To be around all that writes to a workdir, or waits for a checkpoint, and nothing else: Orbax
    tells of a failure in the background at the next call, and what reads other files or connects
    fails with the same types.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # Of a full disk tensorstore says ValueError, JAX RuntimeError, with the system's words
        full = getattr(error, "errno", 0) in FULL or any(x in str(error) for x in FULL.values())
        if not (full or isinstance(error, OSError)):
            raise
        named = getattr(error, "filename", None)
        why, mend = (
            ("your quota or the disk is full", "make room") if full else (error, "mend that")
        )
        if isinstance(error, NoRoom):
            why = f"{why}: {error.strerror}"
        raise Unwritten(
            f"{named if isinstance(named, str) else workdir} could not be written ({why}); "
            f"{latest_in_words(workdir)}: {mend}, then start again"
        ) from error


@contextlib.contextmanager
def ending(workdir: pathlib.Path, first: BaseException | None) -> Iterator[None]:
    """`writing`, around what is closed while the error `first`, if any, is on its way.

    That one stays the error that is raised; what fails here is then a line on stderr, if `first`
    has not said as much.
    """
    try:
        with writing(workdir):
            yield
    except Unwritten as second:
        if first is None:
            raise
        if not isinstance(first, Unwritten):
            print(f"warning: {second}", file=sys.stderr)


def steps_of(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints of a workdir, those still being written left out, ascending."""
    folder = (workdir / CHECKPOINTS).resolve()
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def latest_step(workdir: pathlib.Path) -> int | None:
    """Step of the last checkpoint of a workdir; makes no folder where there is none."""
    return max(steps_of(workdir), default=None)


def latest_in_words(workdir: pathlib.Path) -> str:
    """What an error says there is to go on from."""
    step = latest_step(workdir)
    if step is None:
        return "there is no checkpoint yet"
    return f"the last whole checkpoint is of step {step}"


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: Tree,
    optimizer: Tree,
    data: dict[str, Any],
    ema: Tree | None = None,
    base: bases.Base | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Starts to write checkpoint `step`; arrays may be donated as soon as this returns.

    `data` is what is to be known of the data, of JSON's types, equal on all processes. With a
    `base`, `params` are the parameters that are not in it. `settings` are the config's.
    """
    trees: dict[str, Tree] = {"params": params, "optimizer": optimizer}
    values: dict[str, Any] = {DATA: data}
    if ema is not None:
        trees[EMA] = ema
    if base is not None:
        values[bases.ITEM] = base._asdict()
    if settings is not None:
        values[CONFIG] = dict(settings)
    sums = integrity.record(trees, values)
    items: dict[str, Any] = {
        **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
        **{name: ocp.args.JsonSave(value) for name, value in values.items()},
        integrity.ITEM: ocp.args.JsonSave(sums),
    }
    finish(manager)  # as its `save` would: the last one takes its room
    check_room(pathlib.Path(manager.directory), trees)
    manager.save(step, args=ocp.args.Composite(**items))


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits for the checkpoint that is being written; what is no longer kept is gone then."""
    manager.wait_until_finished()
    empty_trash(pathlib.Path(manager.directory))


def check_room(folder: pathlib.Path, trees: Tree) -> None:
    """Raises `NoRoom` where the disk of a local folder cannot hold these arrays, uncompressed."""
    needed = sum(x.nbytes for x in jax.tree.leaves(trees))
    if folder.is_dir() and needed > (free := shutil.disk_usage(folder).free):
        sizes = f"a checkpoint takes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are left"
        raise NoRoom(errno.ENOSPC, sizes)


def restore(
    workdir: pathlib.Path, step: int, params: Tree, optimizer: Tree, changes: str = "optim.*"
) -> tuple[Tree, Tree, dict[str, Any]]:
    """(params, optimizer, data) of checkpoint `step`.

    `params` and `optimizer` are shapes with shardings, on which arrays are restored. Raises
    `UserError` if the checkpoint has other arrays, or is damaged; nothing is ever deleted here.
    `changes` says which settings may be why the optimizer has others, see resume.py.
    """
    folder = workdir / CHECKPOINTS / str(step)
    arrays.check(folder / "params", params, "this config's model")
    arrays.check(folder / "optimizer", optimizer, f"this config's optimizer ({changes})")
    return (
        arrays.read(folder / "params", params),
        arrays.read(folder / "optimizer", optimizer),
        integrity.read_json(folder / DATA),
    )


def restore_ema(workdir: pathlib.Path, step: int, like: Tree) -> Tree | None:
    """The moving average in checkpoint `step`, laid out as `like` says; None if it has none."""
    folder = workdir.resolve() / CHECKPOINTS / str(step) / EMA
    if not folder.is_dir():
        return None
    arrays.check(folder, like, "what this config trains (optim.frozen, lora)")
    return arrays.read(folder, like)


def read_settings(workdir: pathlib.Path, step: int) -> dict[str, Any] | None:
    """The settings that checkpoint `step` was made with; None if it does not say.

    Raises `UserError` where they are damaged.
    """
    folder = workdir.resolve() / CHECKPOINTS / str(step) / CONFIG
    return integrity.read_json(folder) if folder.is_dir() else None
