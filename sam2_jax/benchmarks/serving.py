"""A process that measures one side, started by workers.py: answers requests, a JSON line each.

Imports neither JAX nor PyTorch, so that the process has only what it measures.
"""

import json
import os
import pathlib
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

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
