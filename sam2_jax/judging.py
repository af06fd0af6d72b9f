"""The figures of an evaluation, in the checkpoint of its step: by them the best are kept.

A checkpoint is written before it is evaluated, so that no evaluation that fails or is left costs a
step. Orbax takes metrics with a save alone; it reads them from the file that is written here.
"""

import json
import math
import pathlib
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sam2_jax import integrity

ITEM = "metrics"  # Orbax's name of the folder and of the file in it
SUM = "sum"  # beside the figures: what `integrity.sum_of_json` makes of them


def judge(manager: ocp.CheckpointManager, step: int, figures: Mapping[str, float]) -> None:
    """Writes the figures into checkpoint `step`, in one go; to be called on all processes.

    Waits until that checkpoint is whole. A figure that is not finite is left out.
    """
    manager.wait_until_finished()
    if jax.process_index() == 0:
        known = {name: float(x) for name, x in figures.items() if math.isfinite(x)}
        folder = pathlib.Path(manager.directory) / str(step) / ITEM
        folder.mkdir(exist_ok=True)
        text = json.dumps(known | {SUM: integrity.sum_of_json(known)})
        part = folder.with_name(f"{ITEM}.tmp")
        part.write_text(text)
        part.replace(folder / ITEM)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"evaluation of step {step} is written")
    manager.reload()


def check(step: pathlib.Path) -> None:
    """Raises `UserError` if the figures in a checkpoint's folder are not what was written.

    Orbax reads those of all checkpoints before it writes one, and gives no name to what is torn.
    """
    folder = step.resolve() / ITEM
    if not (folder / ITEM).is_file():
        return
    with integrity.reading(folder):
        known = json.loads((folder / ITEM).read_text())
        found = known.pop(SUM, None)
    if found != integrity.sum_of_json(known):
        raise integrity.damaged(folder, "not what was saved")
