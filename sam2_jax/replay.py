"""A step that was not finite: what is known of it, saved so that it can be repeated.

`workdir/bad/STEP/` gets `report.json` (losses, norms of gradients, clips, the command), the state
before the step and the batch, of which each process writes its rows. What several processes saved
can be repeated by as many, or by one.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sam2_jax import arrays, checkpoint, reports, sharding, train
from sam2_jax.records import plain
from sam2_jax.train import RandomKey, State, TrainStep
from sam2_jax.types import Batch, UserError
from sam2_jax.updates import UpdateState

BAD, REPORT, STATE = "bad", "report.json", "state"
ROWS = "rows"  # of batch-N.npz: which rows of the whole batch it holds
# Of scripts/train.py: they say where this process is, not what it computes
PLACES = ("coordinator_address", "num_processes", "process_id")


def culprits(values: dict[str, float]) -> list[str]:
    """The terms of the loss and the parts of the model whose numbers are not finite."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    terms = [name for name in bad if name.startswith("loss_")]
    grads = [name for name in bad if name.startswith("grad_norm/")]
    return [*terms, *grads] or bad


def state_before(state: State, step: int, skipped_in_a_row: int) -> tuple[State, bool]:
    """(state before a step that was not finite, whether it is that very state).

    `state` is what followed it, one more step perhaps. Neither changed what is trained; only counts
    are put back, as numpy arrays: of JAX's own, Orbax saves none that one process alone has. Every
    group of the optimizer counts every step that was run, active in it or not; a parameter that is
    not active has a count of its own. Where the step that followed was finite, which is possible
    with `skip` alone, parameters and moments are those after it.
    """
    # Without `skip` the state counts no such step, but how many were run since
    run = int(state.step) - (step - 1) or int(state.skipped)

    def put_back(x: Any) -> Any:
        return x._replace(step=np.asarray(x.step) - run) if isinstance(x, UpdateState) else x

    groups = jax.tree.map(put_back, state.opt_state, is_leaf=lambda x: isinstance(x, UpdateState))
    before = state._replace(
        step=np.array(step - 1, np.int32),
        opt_state=groups,
        skipped=np.array(skipped_in_a_row - 1, np.int32),
    )
    return before, int(state.skipped) >= skipped_in_a_row


def row_numbers(x: Any) -> np.ndarray:
    """Which rows of a batch's array `sharding.local_rows` gives."""
    rows = {shard.index[0].start or 0: len(shard.data) for shard in x.addressable_shards}
    return np.concatenate([np.arange(start, start + rows[start]) for start in sorted(rows)])


def without_places(command: Sequence[str]) -> list[str]:
    """The arguments without those that say which process this is of how many."""
    kept, value_follows = [], False
    for argument in command:
        name, given, _ = argument.lstrip("-").partition("=")
        place = argument.startswith("-") and name in PLACES
        if not place and not value_follows:
            kept.append(argument)
        value_follows = place and not given
    return kept


def advice(workdir: pathlib.Path, settings: Mapping[str, Any]) -> str:
    """What to do about such steps that these settings do not do yet."""
    ways = ["lower optim.learning_rate"]
    if settings["train"]["precision"] != "float32":
        ways.append("take train.precision=float32")
    if settings["train"]["not_finite"] != "skip":
        ways.append("skip such steps with train.not_finite=skip")
    return f"{', or '.join(ways)}; {checkpoint.latest_in_words(workdir)}"


def save(
    workdir: pathlib.Path,
    step: int,
    state: State,
    batch: Batch,
    values: dict[str, float],
    clips: Sequence[str],
    command: Sequence[str],
    settings: Mapping[str, Any],
) -> UserError:
    """Writes the report and what repeats the step; the error that ends the run, to be raised.

    To be called on all processes, with the state after the step or the one after that; returns
    once all have written. `values` are the step's metrics, `command` the arguments that
    scripts/train.py was started with, `settings` those of the config that it came to.
    """
    folder = (workdir / BAD / str(step)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    before, exact = state_before(state, step, int(values["skipped_in_a_row"]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / STATE, before._asdict(), force=True)
    local = jax.tree.map(sharding.local_rows, batch)._asdict()
    local[ROWS] = row_numbers(batch.valid)
    np.savez(folder / f"batch-{jax.process_index()}.npz", **local)
    wrong = culprits(values)
    if jax.process_index() == 0:
        report = {
            "step": step,
            "not_finite": wrong,
            "values": {name: plain(value) for name, value in values.items()},
            "clips": list(clips),
            "command": without_places(command),
            "folder": str(pathlib.Path.cwd()),
            "settings": dict(settings),
            "processes": jax.process_count(),
            "exact": exact,
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    # The first process to end takes the others with it
    multihost_utils.sync_global_devices("what repeats the step is written")
    return UserError(
        f"step {step} is not finite ({', '.join(wrong[:4])}) on the clips {', '.join(clips[:4])}: "
        f"repeat it with scripts/train.py --replay={folder / REPORT}; then "
        + advice(workdir, settings)
    )


def repeat(
    path: pathlib.Path,
    step_fn: TrainStep,
    like: State,
    mesh: Mesh,
    run_key: RandomKey,
    loops: bool = False,
) -> dict[str, float]:
    """Runs the step again, checking for NaN; its metrics.

    Raises FloatingPointError where a NaN first appears, with a traceback into the computation: of a
    loop (over frames, micro-batches) as a whole, or, with `loops`, of each operation in it (a
    choice of branches is one), which are then run one by one; `UserError` where what was saved
    cannot be read, or not by so many processes.
    """
    folder = path.resolve().parent
    batch = read_batch(path)
    wanted = like._asdict()
    arrays.check(folder / STATE, wanted, "this config")
    state = State(**arrays.read(folder / STATE, wanted))
    everywhere = sharding.replicated(mesh)
    run_key = jax.jit(lambda key: key, out_shardings=everywhere)(run_key)
    # Not donated: where a NaN is found the step is run again, operation by operation
    step = jax.jit(step_fn, out_shardings=(train.state_shardings(like, mesh), everywhere))
    with jax.debug_nans(True), jax.disable_jit(loops):
        _, metrics = step(state, sharding.put_batch(batch, mesh), run_key)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}


def read_batch(path: pathlib.Path) -> Batch:
    """This process's rows of the batch that belongs to a report, numpy; on one process all."""
    processes = reports.processes_of(path, reports.read_report(path), jax.process_count())
    own = processes == jax.process_count()
    parts = [jax.process_index()] if own else range(processes)
    found: list[dict[str, np.ndarray]] = []
    for part in parts:
        file = path.resolve().parent / f"batch-{part}.npz"
        try:
            with np.load(file, allow_pickle=False) as values:
                found.append(dict(values))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"--replay={path}: {file.name} beside it cannot be read ({error}): put back what "
                f"the run's {processes} process{'es' * (processes > 1)} wrote there"
            ) from error
    if own:
        return Batch(*(found[0][name] for name in Batch._fields))
    # On a torus the rows need not be in the order of the processes
    _, places = np.unique(np.concatenate([values[ROWS] for values in found]), return_index=True)
    whole = {name: np.concatenate([values[name] for values in found]) for name in Batch._fields}
    return Batch(**{name: value[places] for name, value in whole.items()})
