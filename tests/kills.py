"""Kills a run with SIGKILL at random instants, and compares it with one that was left alone.

    python -m tests.kills
    python -m tests.kills --kills=5 --steps=60 --folder=/tmp/kills

Nano in float32 on the CPU, with worker processes, a moving average, evaluations, and checkpoints
every few steps, written in the background. Three kills in four fall at random within some seconds
(--within; else twice its share of the run) of a start's first step, among steps, evaluations and
saves; the others while it starts. After every fifth kill a start is asked to end instead, with all
its processes, as schedulers do (SIGTERM). After each every checkpoint that is there is read whole
and its sums are compared. A run that ends before all kills is followed by another. Exit status 1
if a checkpoint cannot be read, or a row of the metrics or a final parameter differs in a bit from
those of the run that was left alone.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

# This process only reads checkpoints
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sam2_jax import arrays, checkpoint, integrity, stopping
from tests import processes

EVALUATED, SAVED = 40, 8  # steps from one to the next
SETTINGS = {
    "model.resolution": 64,
    "data.num_frames": 3,
    "data.workers": 2,
    "data.synthetic.eval_clips": 2,
    "data.synthetic.eval_frames": 3,
    "train.precision": "float32",
    "train.log_every": 1,
    "train.ema_decay": 0.99,
    "train.eval_every": EVALUATED,
    "checkpoint.every_steps": SAVED,
}
ASKED = 5  # kills after which one start is asked to end
START = 10.0  # seconds in which a kill may fall while a run starts
POLL = 0.05


def read_whole(step: pathlib.Path) -> dict[str, list[np.ndarray]]:
    """Every array of a checkpoint by item, its other items read too; `UserError` if it cannot be.

    What the checkpoint's sums do not confirm is such an error as well.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shaped = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    found = {}
    for item in ("params", "optimizer", checkpoint.EMA):
        with integrity.reading(step / item):
            place_of = epath.Path((step / item).resolve())
            stored = ocp.PyTreeCheckpointHandler().metadata(place_of).tree
        like = jax.tree.map(lambda x: shaped(x.shape, x.dtype), stored)
        tree = arrays.read(step / item, like)
        found[item] = [np.asarray(x) for x in jax.tree.leaves(tree)]
    for item in (checkpoint.DATA, checkpoint.CONFIG):
        integrity.read_json(step / item)
    return found


def start(workdir: pathlib.Path, steps: int) -> subprocess.Popen:
    """The run, from whatever `workdir` holds."""
    flags = {"train.steps": steps, **SETTINGS}
    arguments = [f"--config.{key}={value}" for key, value in flags.items()]
    given = ["--config=configs/smoke.py", *arguments]
    return processes.start(workdir, 1, 1, given, start_new_session=True)[0]


def wait_for_row(workdir: pathlib.Path, process: subprocess.Popen) -> float:
    """Returns when a start has written its first row, or has ended; the time."""
    path = workdir / "metrics.jsonl"
    writes, last = 0, path.stat().st_mtime if path.exists() else 0.0
    # The first write cuts what is later than the checkpoint, before the step is compiled
    while writes < 2 and process.poll() is None:
        now = path.stat().st_mtime if path.exists() else 0.0
        writes, last = writes + (now != last), now
        time.sleep(POLL)
    return time.monotonic()


def kill_one(
    workdir: pathlib.Path, steps: int, draw: random.Random, within: float, ask: bool
) -> str:
    """Starts the run, kills it or asks it to end, and says when; nothing if it came to its end."""
    process = start(workdir, steps)
    if draw.random() < 0.25:
        wait, when = draw.uniform(0, START), "after the start"
    else:
        wait_for_row(workdir, process)
        wait, when = draw.uniform(0, within), "after the first step"
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        if ask:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.kill()
        code = process.wait()
        if ask and code not in (0, stopping.STOPPED):
            raise RuntimeError(processes.log_of(workdir, 0).read_text()) from None
        return f"{'asked to end' if ask else 'killed'} {wait:.2f} s {when}"
    if process.returncode:
        raise RuntimeError(processes.log_of(workdir, 0).read_text())
    return ""


@dataclasses.dataclass
class Count:
    """How often a run was interrupted so far."""

    kills: int = 0
    asked: int = 0


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--within", type=float, default=0.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--folder", type=pathlib.Path, help="for the runs; kept if given")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        alone = folder / "alone"
        process = start(alone, args.steps)
        began = wait_for_row(alone, process)
        if process.wait():
            raise RuntimeError(processes.log_of(alone, 0).read_text())
        seconds = time.monotonic() - began
        within = args.within or 2 * seconds / args.kills
        print(f"left alone: {args.steps} steps in {seconds:.1f} s", flush=True)
        count, differ, runs = Count(), False, 0
        while count.kills < args.kills:
            runs += 1
            killed = folder / f"killed{runs}"
            while count.kills < args.kills and interrupt(killed, args.steps, draw, within, count):
                pass
            code = start(killed, args.steps).wait()
            if code:
                raise RuntimeError(processes.log_of(killed, 0).read_text())
            differ |= compare(killed, alone, args.steps)
    print(f"killed {count.kills} times, asked to end {count.asked} times, in {runs} runs")
    return int(differ)


def interrupt(
    killed: pathlib.Path, steps: int, draw: random.Random, within: float, count: Count
) -> bool:
    """One more kill or request, after which all checkpoints are read; False if the run ended."""
    ask = count.asked < count.kills // ASKED
    when = kill_one(killed, steps, draw, within, ask)
    if when:
        count.kills, count.asked = count.kills + (not ask), count.asked + ask
        there = checkpoint.steps_of(killed)
        for step in there:
            read_whole(killed / checkpoint.CHECKPOINTS / str(step))
        found = f"{len(processes.rows(killed))} rows, checkpoints {there} whole"
        print(f"{count.kills + count.asked}: {when}, {found}", flush=True)
    return bool(when)


def compare(killed: pathlib.Path, alone: pathlib.Path, steps: int) -> bool:
    """Whether two finished runs differ in any bit of their rows or of what they saved last."""
    rows = [processes.rows(x) for x in (killed, alone)]
    last = [read_whole(x / checkpoint.CHECKPOINTS / str(steps)) for x in (killed, alone)]
    same_rows = rows[0] == rows[1]
    same_arrays = jax.tree.all(jax.tree.map(np.array_equal, *last))
    print(f"{len(rows[1])} rows of metrics: {'identical' if same_rows else 'DIFFERENT'}")
    print(f"parameters, optimizer, average: {'identical' if same_arrays else 'DIFFERENT'}")
    return not (same_rows and same_arrays)


if __name__ == "__main__":
    sys.exit(main())
