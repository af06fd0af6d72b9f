"""The two sides in processes of their own, which take turns: one waits while the other works."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sam2_jax.benchmarks import serving
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]


class Worker:
    """A process that runs one of this package's modules on a folder; see serving.py."""

    def __init__(self, module: str, folder: pathlib.Path, env: Mapping[str, str] | None = None):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._module = module
        self._log = folder / f"{module}.{time.time_ns()}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"sam2_jax.benchmarks.{module}", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": path} | dict(env or {}),
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """What it answers. Raises UserError if it ends instead."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # told below, with what it wrote
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        told = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(
            f"the process of {self._module} ended with status {status} "
            f"({'killed, perhaps for want of memory' if status == -9 else told[-1]}): "
            "measure something smaller (--resolution, --frames, --objects)"
        )

    def close(self) -> None:
        """Ends it and waits."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close() if pipe else None
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def started(
    module: str, folder: pathlib.Path, env: Mapping[str, str] | None = None
) -> Iterator[Worker]:
    """A worker for as long as the context lasts."""
    worker = Worker(module, folder, env)
    try:
        yield worker
    finally:
        worker.close()


def prepare(
    folder: pathlib.Path,
    setup: dict[str, Any],
    images: np.ndarray,
    masks: np.ndarray,
    plans: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Writes what both sides read (see serving.py): settings that JSON can hold, and arrays."""
    (folder / serving.SETUP).write_text(json.dumps(setup))
    np.savez(folder / serving.CLIPS, images=images, masks=masks)
    if plans:
        fields = {f"{name}.{k}": x for name, plan in plans.items() for k, x in plan.items()}
        np.savez(folder / serving.PLANS, **fields)  # pyright: ignore[reportArgumentType]
