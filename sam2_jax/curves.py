"""`loss.png`: the curves of a run."""

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sam2_jax import plots

SHARE = 0.01  # of a run's time that drawing may take


class Curves:
    """`loss.png` of a run beside its `metrics.jsonl`, drawn anew as often as costs little."""

    def __init__(self, workdir: Path):
        self._rows, self._picture = workdir / "metrics.jsonl", workdir / "loss.png"
        self._due = -np.inf  # in seconds of time.monotonic

    def draw(self, at_once: bool = False) -> None:
        """Draws, unless that has lately taken more than `SHARE` of the time."""
        start = time.monotonic()
        if at_once or start >= self._due:
            loss_curves(self._rows, self._picture)
            end = time.monotonic()
            self._due = end + (end - start) / SHARE


def loss_curves(metrics_jsonl: str | Path, out_png: str | Path) -> None:
    """Draws the loss and its terms, evaluation beside the static baseline, and learning rates.

    Reads the rows of a run's metrics.jsonl; a last row cut short by a kill is left out.
    """
    rows = _read(metrics_jsonl)
    figure = Figure(figsize=(12, 8), dpi=plots.DPI, layout="constrained")
    loss, terms, quality, rates = figure.subplots(2, 2).flat
    by_source = [k for k in _keys(rows) if k.endswith("/loss") and not k.startswith("eval")]
    _curves(loss, rows, by_source or ["loss"], "loss", smooth=True)
    names = [k for k in _keys(rows) if k.startswith("loss_")]
    _curves(terms, rows, names, "terms of the loss, unweighted", smooth=True)
    _curves(quality, rows, _scores(rows), "evaluation", marker="o")
    static = [k for k in _keys(rows) if k.endswith("static J&F")]
    styles = itertools.cycle([":", "-.", "--", (0, (1, 4))])
    for name, style in zip(static, styles, strict=False):
        of = name.removeprefix("eval/").removesuffix("static J&F")
        label = f"{of}static first-frame mask, J&F"
        quality.plot(*_series(rows, name), ls=style, color="0.3", label=label)
    quality.set_ylim(0, 1)
    names = [k for k in _keys(rows) if k.startswith(("learning_rate", "lr"))]
    _curves(rates, rows, names, "learning rate")
    last = max((row["step"] for row in rows), default=0)
    for axes in (loss, terms, quality, rates):
        axes.set_xlim(0, 1.02 * last or 1)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    plots.save(figure, out_png)


def _curves(
    axes: Any,
    rows: list[dict[str, Any]],
    names: list[str],
    title: str,
    smooth: bool = False,
    marker: str = "",
) -> None:
    """Plots the named series, logarithmic where they span more than a factor of 10."""
    axes.set_title(title, fontsize=11)
    low, high = np.inf, 0.0
    for i, name in enumerate(names):
        steps, values = _series(rows, name)
        if not len(steps):
            continue
        colour = f"C{i}"
        if smooth and len(steps) >= 20:
            axes.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
            values = _smooth(values)
        axes.plot(steps, values, color=colour, lw=1.6, marker=marker, ms=4, label=name)
        low, high = min(low, values.min()), max(high, values.max())
    if not marker and 0 < 10 * low < high:
        axes.set_yscale("log")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the run, shorter at both ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, index[::-1]))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _read(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _scores(rows: list[dict[str, Any]]) -> list[str]:
    """J&F of every set and prompt, and, of a single one, J and F."""
    names = [k for k in _keys(rows) if re.fullmatch(r"eval/(\S*/)?J&F", k)]
    alone = [names[0].removesuffix("J&F") + k for k in ("J", "F")] if len(names) == 1 else []
    return [*names, *alone]


def _keys(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(k for row in rows for k in row))


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, in order of step."""
    found = {r["step"]: r[name] for r in rows if r.get(name) is not None and np.isfinite(r[name])}
    steps = sorted(found)
    return np.array(steps), np.array([found[s] for s in steps], float)
