"""A step that was not finite: what is known of it, saved so that it can be repeated.

`workdir/bad/STEP/` gets `report.json` (losses, norms of gradients, clips, the command), the state
before the step and the batch.
"""

import json
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from sam2_jax import arrays, sharding
from sam2_jax.records import plain
from sam2_jax.train import RandomKey, State, TrainStep
from sam2_jax.types import Batch, UserError

BAD, REPORT, STATE = "bad", "report.json", "state"


def culprits(values: dict[str, float]) -> list[str]:
    """The terms of the loss and the parts of the model whose numbers are not finite."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    terms = [name for name in bad if name.startswith("loss_")]
    grads = [name for name in bad if name.startswith("grad_norm/")]
    return [*terms, *grads] or bad


def save(
    workdir: pathlib.Path,
    step: int,
    state: State,
    batch: Batch,
    values: dict[str, float],
    clips: Sequence[str],
    command: Sequence[str],
) -> UserError:
    """Writes the report and what repeats the step; the error that ends the run, to be raised.

    To be called on all processes; each writes its share of the batch. `command` are the arguments
    that scripts/train.py was started with.
    """
    folder = (workdir / BAD / str(step)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    before = state._replace(step=jnp.asarray(step - 1, jnp.int32), skipped=jnp.zeros((), jnp.int32))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / STATE, before._asdict(), force=True)
    local = jax.tree.map(sharding.local_rows, batch)
    np.savez(folder / f"batch-{jax.process_index()}.npz", **local._asdict())
    wrong = culprits(values)
    if jax.process_index() == 0:
        report = {
            "step": step,
            "not_finite": wrong,
            "values": {name: plain(value) for name, value in values.items()},
            "clips": list(clips),
            "command": list(command),
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return UserError(
        f"step {step} is not finite ({', '.join(wrong[:4])}) on the clips {', '.join(clips[:4])}: "
        f"repeat it with scripts/train.py --replay={folder / REPORT}; then lower "
        "optim.learning_rate, take train.precision=float32, or skip such steps with "
        "train.not_finite=skip; the last checkpoint is from before"
    )


def repeat(
    path: pathlib.Path, step_fn: TrainStep, like: State, mesh: Mesh, run_key: RandomKey
) -> dict[str, float]:
    """Runs the step again, checking for NaN; its metrics.

    Raises FloatingPointError, with a traceback into the computation, where a NaN first appears.
    """
    folder = path.resolve().parent
    wanted = like._asdict()
    arrays.check(folder / STATE, wanted, "this config")
    state = State(**arrays.read(folder / STATE, wanted))
    with np.load(folder / f"batch-{jax.process_index()}.npz", allow_pickle=False) as file:
        batch = Batch(**{name: file[name] for name in Batch._fields})
    with jax.debug_nans(True):
        # Not donated: where a NaN is found the step is run again, operation by operation
        _, metrics = jax.jit(step_fn)(state, sharding.put_batch(batch, mesh), run_key)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}
