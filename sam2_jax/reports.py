"""Reading the report of a step that was not finite; replay.py writes it."""

import json
import pathlib
from typing import Any

from sam2_jax.types import UserError


def read_report(path: pathlib.Path) -> dict[str, Any]:
    """What `save` wrote; raises `UserError` if it is no such file."""
    try:
        report = json.loads(path.read_text())
        kinds = {"step": int, "command": list, "settings": dict}
        if all(isinstance(report[name], kind) for name, kind in kinds.items()):
            return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--replay={path} is no report of a bad step ({error!r}): give the report.json that "
            "the run named"
        ) from error
    raise UserError(f"--replay={path} is no report of a bad step: give the report.json of a run")


def processes_of(path: pathlib.Path, report: dict[str, Any], now: int) -> int:
    """How many processes saved what belongs to a report; `UserError` if `now` cannot repeat it."""
    saved = report.get("processes", 1)  # reports of one process alone may lack it
    if now not in {1, saved}:
        raise UserError(
            f"--replay={path} is of a run of {saved} process{'es' * (saved != 1)}, this one has "
            f"{now}: repeat it on one process, without --num_processes"
            + (f", or on {saved}" if saved > 1 else "")
        )
    return saved
