"""Cost against frames, objects and resolution: `benchmark.py plot`."""

import json
import pathlib
import statistics
from collections import defaultdict
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sam2_jax.benchmarks.settings import OURS, REFERENCE
from sam2_jax.config import Parser
from sam2_jax.types import UserError

AXES = ("frames", "objects", "resolution")
# Label, unit, and the keys of a file of `benchmark.py step` for ours and the reference's
COSTS = (
    ("seconds a step", 1, "seconds", "reference_seconds"),
    ("peak of a process, GiB", 2**30, "peak_bytes", "reference_peak_bytes"),
    ("TFLOP a step", 1, "tflop_by_plan", "reference_tflop_by_plan"),
)
Point = tuple[int, float | int]  # size, cost
FIXED = ("variant", "batch_size", "threads", "precision", "remat", "attention", "plans")


def run(argv: list[str]) -> None:
    """Draws seconds, memory and TFLOP of a step from the files that `benchmark.py step` wrote.

    A line joins files that differ in frames, objects or resolution alone. Of several plans it is
    the mean. What no two such files tell is left out, as memory where all is --work-only.
    """
    parser = Parser(run.__doc__)
    parser.add_argument("--json", nargs="+", type=pathlib.Path, required=True, help="the files")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    draw([read(path) for path in args.json], args.output)


def read(path: pathlib.Path) -> dict[str, Any]:
    """The figures of one file; UserError if they are not those of a step."""
    try:
        figures = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--json={path} cannot be read ({error})") from error
    needed = {*AXES, *FIXED, "tflop_by_plan"}
    if not isinstance(figures, dict) or needed - figures.keys():
        raise UserError(f"--json={path} is no file of `benchmark.py step`: give one that is")
    return figures


def value_of(figures: dict[str, Any], key: str) -> float | int | None:
    """A number, or the mean over the plans; None where it was not measured."""
    found = figures.get(key)
    return statistics.fmean(found.values()) if isinstance(found, dict) else found


def lines(files: list[dict[str, Any]], axis: str, key: str) -> dict[str, list[Point]]:
    """Points by what else a file says, of at least two files each."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for figures in files:
        value = value_of(figures, key)
        if value is None:
            continue
        others = [f"{figures[name]} {name}" for name in AXES if name != axis]
        fixed = [figures[name] for name in FIXED[1:]]
        name = json.dumps([figures["variant"], others, fixed])
        groups[name].append((figures[axis], value))
    return {name: sorted(points) for name, points in groups.items() if len(dict(points)) > 1}


def draw(files: list[dict[str, Any]], output: pathlib.Path) -> None:
    """Writes the picture; UserError where no two files make a line, or it cannot be written."""
    told = [cost for cost in COSTS if any(lines(files, x, key) for x in AXES for key in cost[2:])]
    if not told:
        raise UserError("--json: no two files differ in frames, objects or resolution alone")
    figure = Figure(figsize=(13, 3.5 * len(told)), dpi=110, layout="constrained")
    grid = figure.subplots(len(told), len(AXES), squeeze=False)
    for row, (label, unit, own, theirs) in zip(grid, told, strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            axes.set_xlabel(f"{axis}{', pixels' if axis == 'resolution' else ''}")
            axes.set_ylabel(label)
            for style, side, key in (("-", OURS, own), ("--", REFERENCE, theirs)):
                for i, (name, points) in enumerate(sorted(lines(files, axis, key).items())):
                    variant, others, _ = json.loads(name)
                    text = f"{side}, {variant}, {', '.join(others)}"
                    at, values = zip(*points, strict=True)
                    heights = [value / unit for value in values]
                    axes.plot(at, heights, style, color=f"C{i}", marker="o", label=text)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
    try:
        FigureCanvasAgg(figure).print_png(output)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error})") from error
