"""What a run leaves to read: metrics.jsonl, one JSON object per row, and TensorBoard events."""

import contextlib
import hashlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sam2_jax.events import Events
from sam2_jax.types import UserError


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is the old one or the new one, whole, at any time."""
    whole = path.with_name(f"{path.name}.tmp")
    try:
        with whole.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            whole.unlink()
        raise


def whole_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none of a file that is not there.

    A last row that is torn is left out: the run died while it wrote that one. Any other line that
    is no row is a `UserError`: what follows it would be lost.
    """
    rows = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError("its step is no number")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} of {len(lines)} is damaged ({error!r}), expected a JSON "
                "object with a step: delete that line, or put back a whole copy"
            ) from error
        rows.append(row)
    return rows


def cut_after(path: pathlib.Path, step: int) -> None:
    """Drops the rows of a metrics.jsonl that are later than `step`, and a torn last line."""
    if not path.exists():
        return
    replace(path, "".join(json.dumps(x) + "\n" for x in whole_rows(path) if x["step"] <= step))


def was_evaluated(path: pathlib.Path, step: int) -> bool:
    """Whether a metrics.jsonl has the row of an evaluation at `step`."""
    return any(
        row["step"] == step and any(name.startswith("eval/") for name in row)
        for row in whole_rows(path)
    )


def plain(value: float) -> float | None:
    """A number for JSON, which knows neither NaN nor infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


METRICS, BEST, WORST_FILE = "metrics.jsonl", "best.json", "worst.json"
WORST = 10  # batches that are listed


class Seen(NamedTuple):
    """Batches whose losses stood out, and what was usual; see `loop.Worst`."""

    rows: list[tuple[float, int, float, list[str]]]  # times the usual, step, loss, clips
    recent: list[tuple[int, float]]  # step, loss of a decoder pass


NOTHING_SEEN = Seen([], [])


def wandb() -> Any:
    """The package of Weights & Biases; `UserError` where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "train.wandb names a project of Weights & Biases, which is not installed: pip install "
            "-e '.[wandb]', or leave train.wandb empty"
        ) from error


class Records:
    """Appends rows to a workdir's metrics.jsonl and TensorBoard events; goes on after `step`.

    What cannot be written is an `OSError` at once.
    """

    def __init__(self, workdir: pathlib.Path, step: int = 0, project: str = ""):
        """`project`: of Weights & Biases, which gets the same rows; empty: none."""
        client = wandb() if project else None
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / METRICS
        cut_after(self.path, step)
        self._file = self.path.open("a")
        self._events = Events(workdir / "tensorboard", step)
        self._wandb: Any = None
        if client:
            # The same workdir is the same run there, whenever it goes on
            name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
            self._wandb = client.init(
                project=project, id=name, name=workdir.name, dir=str(workdir), resume="allow"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: `step`, then the values. Readable at once."""
        row = {"step": step} | {name: plain(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            tag = name if "/" in name else f"train/{name}"
            self._events.scalar(tag, float(value), step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def best(self, name: str, is_lowest: bool, kept: Container[int] | None = None) -> None:
        """Writes best.json: step and value of the best evaluation so far by one metric.

        Of those whose checkpoint is `kept`, if given; of equals the last, as checkpoints are.
        """
        found = [
            (-row[name] if is_lowest else row[name], row["step"])
            for row in whole_rows(self.path)
            if row.get(name) is not None and (kept is None or row["step"] in kept)
        ]
        if found:
            value, step = max(found)
            value = -value if is_lowest else value
            text = json.dumps({"step": step, "metric": name, "value": value}) + "\n"
            replace(self.path.with_name(BEST), text)

    def pictures(self, step: int, since: float) -> None:
        """Shows the overlays of the workdir that were drawn after the time `since`."""
        for path in sorted(self.path.parent.glob("overlay*.png")):
            if path.stat().st_mtime >= since:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._events.image(f"eval/{path.stem}", pixels, step)
                if self._wandb:
                    self._wandb.log({f"eval/{path.stem}": wandb().Image(pixels)}, step=step)

    def count_skipped(self) -> int:
        """Steps without an update in the rows that there are, each of which has one."""
        return sum(bool(row.get("skipped_in_a_row")) for row in whole_rows(self.path))

    def worst(self, seen: Seen) -> None:
        """Writes worst.json: clips, step, loss and how far it stood out, the furthest first."""
        rows = [
            {"times_the_usual": plain(times), "step": n, "loss": plain(loss), "clips": clips}
            for times, n, loss, clips in seen.rows
        ]
        text = json.dumps({"worst": rows, "recent": seen.recent}) + "\n"
        replace(self.path.with_name(WORST_FILE), text)

    def read_worst(self, step: int) -> Seen:
        """What concerns steps up to `step`, as an earlier start wrote it; nothing if it is torn.

        Nothing but this list depends on them: a damaged one is told of, and begun anew.
        """
        path = self.path.with_name(WORST_FILE)
        if not path.exists():
            return NOTHING_SEEN

        def number(x: float | None) -> float:
            return math.inf if x is None else float(x)

        try:
            found = json.loads(path.read_text())
            rows = [
                (number(row["times_the_usual"]), row["step"], number(row["loss"]), row["clips"])
                for row in found["worst"]
            ]
            recent = [(int(n), float(each)) for n, each in found["recent"]]
            return Seen([x for x in rows if x[1] <= step], [x for x in recent if x[0] <= step])
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"note: {path} cannot be read ({error!r}): begun anew", flush=True)
            return NOTHING_SEEN

    def sync(self) -> None:
        """Returns once every row is on disk: to be called before a checkpoint is written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes, all of it whichever fails."""
        with contextlib.ExitStack() as stack:
            if self._wandb:
                stack.callback(self._wandb.finish)
            stack.callback(self._events.close)
            stack.callback(self._file.close)
            self.sync()
