"""What a run leaves to read: metrics.jsonl, one JSON object per row, and TensorBoard events."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

from tensorboardX import SummaryWriter


def cut_after(path: pathlib.Path, step: int) -> None:
    """Drops the rows of a metrics.jsonl that are later than `step`, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the run died while it wrote this row: everything before is whole
        if row["step"] <= step:
            kept.append(line + "\n")
    whole = path.with_suffix(".tmp")
    with whole.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(path)


def was_evaluated(path: pathlib.Path, step: int) -> bool:
    """Whether a metrics.jsonl has the row of an evaluation at `step`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return any(row["step"] == step and any(k.startswith("eval/") for k in row) for row in rows)


def plain(value: float) -> float | None:
    """A number for JSON, which knows neither NaN nor infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


METRICS = "metrics.jsonl"


class Records:
    """Appends rows to a workdir's metrics.jsonl and TensorBoard events; goes on after `step`."""

    def __init__(self, workdir: pathlib.Path, step: int = 0):
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / METRICS
        cut_after(self.path, step)
        self._file = self.path.open("a")
        # Given at step 0, too: a run may have died before its first checkpoint.
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: `step`, then the values. Readable at once."""
        row = {"step": step} | {name: plain(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            tag = name if "/" in name else f"train/{name}"
            self._events.add_scalar(tag, float(value), step)

    def best(self, step: int, row: Mapping[str, float], name: str, is_lowest: bool) -> None:
        """Writes best.json if a metric of an evaluation is the best so far."""
        if name not in row:
            return
        path = self.path.parent / "best.json"
        now = {"step": step, "metric": name, "value": plain(row[name])}
        before = json.loads(path.read_text()) if path.exists() else {}
        if before.get("metric") == name and before["step"] < step:
            better = now["value"] < before["value"] if is_lowest else now["value"] > before["value"]
            if not better:
                return
        path.write_text(json.dumps(now) + "\n")

    def worst(self, rows: Sequence[tuple[float, int, list[str]]]) -> None:
        """Writes worst.json: loss, step and clips of the batches with the highest losses."""
        text = [{"loss": plain(loss), "step": n, "clips": clips} for loss, n, clips in rows]
        (self.path.parent / "worst.json").write_text(json.dumps(text, indent=1) + "\n")

    def sync(self) -> None:
        """Returns once every row is on disk: to be called before a checkpoint is written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.sync()
        self._file.close()
        self._events.close()
