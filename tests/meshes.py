"""Trains one short run on every mesh, in one process and in several, and compares with one device.

    python -m tests.meshes
    python -m tests.meshes --only=2x4,4x1 --folder=/tmp/meshes

A mesh is DATAxFSDP, or PROCESSES*DATAxFSDP. Prints a Markdown table of the largest relative
difference in the loss of a step and of the evaluation, and of the distance of the final parameters
from those of one device in units of their norm. Nano in float32, eight videos a batch, on CPU
devices. Takes a minute or two a mesh. Exit status 1 if a loss or the parameters differ by more than
1e-5.
"""

import argparse
import pathlib
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import processes

DEVICES = 8
TOLERANCE = 1e-5
SETTINGS = {
    "model.resolution": 64,
    "data.num_frames": 3,
    "data.batch_size": DEVICES,
    "data.synthetic.eval_clips": 4,
    "data.synthetic.eval_frames": 3,
    "eval.loss_clips": 4,
    "prompts.prob_points": 0.0,
    "train.precision": "float32",
    "train.log_every": 1,
}


def all_meshes() -> list[str]:
    """Every split of 1, 2, 4, 8 devices, and several processes."""
    sizes = [1, 2, 4, 8]
    alone = [f"{n // fsdp}x{fsdp}" for n in sizes for fsdp in sizes if n % fsdp == 0]
    return [*alone, "2*2x4", "2*8x1", "4*1x4", "4*4x2"]


def parse(mesh: str) -> tuple[int, int, int]:
    """(processes, data, fsdp)."""
    count, _, shape = mesh.rpartition("*")
    data, fsdp = map(int, shape.split("x"))
    return int(count or 1), data, fsdp


def train(mesh: str, folder: pathlib.Path, steps: int) -> tuple[list[dict], np.ndarray]:
    """Rows of metrics and final parameters as one vector; what has run before is read again."""
    count, data, fsdp = parse(mesh)
    workdir = folder / mesh.replace("*", "p")
    settings = SETTINGS | {"mesh.data": data, "mesh.fsdp": fsdp, "train.steps": steps}
    settings["optim.warmup_steps"] = steps // 2
    arguments = ["--config=configs/smoke.py"]
    arguments += [f"--config.{key}={value}" for key, value in settings.items()]
    if not (workdir / "checkpoints" / str(steps)).is_dir():
        processes.run(workdir, count, data * fsdp // count, arguments)
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
        print("| processes | data | fsdp | losses | evaluation | parameters |", flush=True)
        print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for mesh in args.only.split(",") if args.only else all_meshes()[1:]:
            rows, params = train(mesh, folder, args.steps)
            worst = {True: 0.0, False: 0.0}  # by whether the row is of an evaluation
            for row, other in zip(rows, expected, strict=True):
                for key in row.keys() & {"loss", "eval/loss"}:
                    off = abs(row[key] - other[key]) / abs(other[key])
                    worst[key != "loss"] = max(worst[key != "loss"], off)
            apart = float(np.linalg.norm(params - whole) / np.linalg.norm(whole))
            wrong |= max(*worst.values(), apart) > TOLERANCE
            cells = [*parse(mesh), *(f"{x:.1e}" for x in (worst[False], worst[True], apart))]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
