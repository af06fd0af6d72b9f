"""Trains one short run on every mesh, in one process and in several, and compares with one device.

    python -m tests.meshes
    python -m tests.meshes --only=2x4,1x1x2,8x1+2x2+1x1+4x2 --folder=/tmp/meshes

A mesh is DATAxFSDP or DATAxFSDPxMODEL, with PROCESSES* before it where there are several. Of meshes
with + between them each goes on from the checkpoint of the one before, which was asked to stop.
Prints a Markdown table of the largest relative difference in the loss of a step and of the
evaluation, and of the distance of the final parameters from those of one device in units of their
norm. Nano in float32, eight videos a batch of 3 frames at 64 pixels with up to 3 objects, which two
devices along `model` cannot share evenly, on CPU devices. Masks are the only prompts and nothing is
dropped, so that the results must be those of one device on every mesh. Takes a minute or two a
mesh. Exit status 1 if a loss or the parameters differ by more than 1e-5.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from sam2_jax import stopping
from tests import processes

DEVICES = 8
TOLERANCE = 1e-5
SETTINGS = {
    "model.resolution": 64,
    "data.num_frames": 3,
    "data.max_objects": 3,
    "data.batch_size": DEVICES,
    "data.synthetic.eval_clips": 4,
    "data.synthetic.eval_frames": 3,
    "eval.loss_clips": 4,
    "prompts.prob_points": 0.0,
    "train.precision": "float32",
    "train.log_every": 1,
}


def all_meshes() -> list[str]:
    """Every split of 1, 2, 4, 8 devices, devices that share videos, several processes, routes."""
    sizes = [1, 2, 4, 8]
    alone = [f"{n // fsdp}x{fsdp}" for n in sizes for fsdp in sizes if n % fsdp == 0]
    several = ["2*2x4", "2*8x1", "2*2x1x2", "4*1x4", "4*4x2"]
    return [*alone, "1x1x2", "2x2x2", *several, "8x1+2x2+1x1+4x2"]


def parse(mesh: str) -> tuple[int, int, int, int]:
    """(processes, data, fsdp, model)."""
    count, _, shape = mesh.rpartition("*")
    data, fsdp, model = [*map(int, shape.split("x")), 1][:3]
    return int(count or 1), data, fsdp, model


def go_on(workdir: pathlib.Path, mesh: str, steps: int, until: int) -> None:
    """Trains on a mesh, from what `workdir` holds, to the end or until so many steps are done."""
    count, data, fsdp, model = parse(mesh)
    axes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.model": model}
    settings = SETTINGS | axes | {"train.steps": steps}
    arguments = ["--config=configs/smoke.py"]
    arguments += [f"--config.{key}={value}" for key, value in settings.items()]
    if until == steps:
        return processes.run(workdir, count, data * fsdp * model // count, arguments)
    started = processes.start(workdir, count, data * fsdp * model // count, arguments)
    while len(processes.rows(workdir)) < until and started[0].poll() is None:
        time.sleep(0.02)
    for process in started:
        process.terminate()
    if [process.wait() for process in started] != [stopping.STOPPED] * count:
        raise RuntimeError(processes.log_of(workdir, 0).read_text())


def train(mesh: str, folder: pathlib.Path, steps: int) -> tuple[list[dict], np.ndarray]:
    """Rows of metrics and final parameters as one vector; what has run before is read again."""
    workdir = folder / mesh.replace("*", "p")
    legs = mesh.split("+")
    if not (workdir / "checkpoints" / str(steps)).is_dir():
        for i, leg in enumerate(legs, 1):
            go_on(workdir, leg, steps, until=steps * i // len(legs))
    path = (workdir / "checkpoints" / str(steps) / "params").resolve()
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        params = reader.restore(path, restore_args=as_numpy)
    return processes.rows(workdir), np.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--only", default="", help="meshes, by comma; default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=pathlib.Path, help="for the runs; kept if given")
    args = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        expected, whole = train("1x1", folder, args.steps)
        print("| mesh | losses | evaluation | parameters |", flush=True)
        print("| --- | ---: | ---: | ---: |", flush=True)
        for mesh in args.only.split(",") if args.only else all_meshes()[1:]:
            rows, params = train(mesh, folder, args.steps)
            worst = {True: 0.0, False: 0.0}  # by whether the row is of an evaluation
            for row, other in zip(rows, expected, strict=True):
                for key in row.keys() & {"loss", "eval/loss"}:
                    off = abs(row[key] - other[key]) / abs(other[key])
                    worst[key != "loss"] = max(worst[key != "loss"], off)
            apart = float(np.linalg.norm(params - whole) / np.linalg.norm(whole))
            wrong |= max(*worst.values(), apart) > TOLERANCE
            cells = [mesh, *(f"{x:.1e}" for x in (worst[False], worst[True], apart))]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
