"""Reading the report of a step that was not finite; replay.py writes it."""

import json
import pathlib
from typing import Any

from sam2_jax.types import UserError


def read_report(path: pathlib.Path) -> dict[str, Any]:
    """What `save` wrote; raises `UserError` if it is no such file."""
    try:
        report = json.loads(path.read_text())
        if isinstance(report["step"], int) and isinstance(report["command"], list):
            return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--replay={path} is no report of a bad step ({error!r}): give the report.json that "
            "the run named"
        ) from error
    raise UserError(f"--replay={path} is no report of a bad step: give the report.json of a run")
