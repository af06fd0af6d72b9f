"""A process that measures one side, started by workers.py: answers requests, a JSON line each.

Imports neither JAX nor PyTorch, so that the process has only what it measures. What it is given
lies in a folder, as JSON and arrays: nothing is unpickled.
"""

import json
import os
import pathlib
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

# What workers.py writes into the folder, but for the weights, which the reference's side does
SETUP, PLANS, CLIPS, WEIGHTS = "setup.json", "plans.npz", "clips.npz", "weights.npz"
CLEAR, STATUS = (pathlib.Path("/proc/self") / name for name in ("clear_refs", "status"))
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(make: Callable[[pathlib.Path], Answer]) -> None:
    """Reads requests from stdin until it ends. `make` is given the folder with what is measured.

    Whatever else is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = make(pathlib.Path(sys.argv[1]))
    highest = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("forget_peak", False):
            highest = forget_peak()
        found = answer(request)
        since = peak_bytes()
        found |= {"peak_bytes": max(highest, since), "peak_since": since}
        print(json.dumps(found), file=answers, flush=True)


def read_setup(folder: pathlib.Path) -> dict[str, Any]:
    """The settings; every list a tuple, as configs and variants have them."""
    return _with_tuples(json.loads((folder / SETUP).read_text()))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(x) for name, x in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name."""
    with np.load(path) as arrays:
        return dict(arrays)


def read_plans(folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """The fields of every plan, by its name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, x in read_arrays(folder / PLANS).items():
        name, field = path.split(".")
        found.setdefault(name, {})[field] = x
    return found


def use_threads(threads: int) -> None:
    """Keeps this process to so many cores, before a library counts them; Linux only."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def peak_bytes() -> int:
    """The most memory that this process has held, since `forget_peak` if that was called."""
    if STATUS.exists():
        # What getrusage tells begins, on Linux, with the peak of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        assert found
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> int:
    """Begins the peak anew, on Linux, from what is held now; returns the peak until here."""
    peak = peak_bytes()
    if CLEAR.exists():
        CLEAR.write_text("5")
    return peak
