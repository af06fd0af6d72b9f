"""Starts scripts/train.py as several processes that compute one run, on CPU devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

from sam2_jax.progress import MACHINE
from tests import quick

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_one(
    workdir: pathlib.Path,
    process: int,
    processes: int,
    devices: int,
    address: str,
    arguments: list[str],
    start_new_session: bool = False,
) -> subprocess.Popen:
    """One process of a run, with `devices` CPU devices; what it says is in `log_of`.

    `start_new_session`: it leads a group of its own, of all that it starts.
    """
    command = [sys.executable, "scripts/train.py", f"--workdir={workdir}", *arguments]
    if processes > 1:
        command += [f"--coordinator_address={address}", f"--num_processes={processes}"]
        command += [f"--process_id={process}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env["XLA_FLAGS"] = quick.XLA_FLAGS
    with log_of(workdir, process).open("w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=start_new_session,
        )


def start(
    workdir: pathlib.Path,
    processes: int,
    devices: int,
    arguments: list[str],
    start_new_session: bool = False,
) -> list[subprocess.Popen]:
    """All `processes` of a run, with `devices` each."""
    address = f"localhost:{free_port()}"
    each = processes, devices, address, arguments, start_new_session
    return [start_one(workdir, i, *each) for i in range(processes)]


def log_of(workdir: pathlib.Path, process: int) -> pathlib.Path:
    return workdir.with_name(f"{workdir.name}.{process}.log")


def run(workdir: pathlib.Path, processes: int, devices: int, arguments: list[str]) -> None:
    """To its end; raises `RuntimeError` with the log of the first process that failed."""
    started = start(workdir, processes, devices, arguments)
    codes = [process.wait() for process in started]
    for i, code in enumerate(codes):
        if code:
            raise RuntimeError(f"process {i}: status {code}\n{log_of(workdir, i).read_text()}")


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for what depends on the machine's speed."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(x).items() if k not in MACHINE} for x in lines]
