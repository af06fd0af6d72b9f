"""One of several processes that save a step of the model of tests/test_train.py, and repeat it.

python -m tests.replaying FOLDER HOST:PORT PROCESSES PROCESS
"""

import json
import pathlib
import sys

import jax
import numpy as np

from sam2_jax import replay, sharding

STEP = 3
KEY = 7
SETTINGS = {"train": {"precision": "float32", "not_finite": "skip"}}


def main(folder: pathlib.Path, address: str, processes: int, process: int) -> None:
    """Step 3 on good data, that what is repeated can be compared, after one on bad data."""
    jax.distributed.initialize(address, processes, process)
    from tests.test_train import example, setup  # it asks for devices

    mesh = sharding.make_mesh(1, processes, 1)
    state, step, like = setup(mesh)
    key = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(jax.random.key(KEY))

    def share(i: int, broken: bool = False):
        batch = example(i)
        if broken:
            batch = batch._replace(valid=np.zeros_like(batch.valid))  # divides by no object
        each = len(batch.valid) // processes
        mine = slice(process * each, (process + 1) * each)
        return sharding.put_batch(jax.tree.map(lambda x: x[mine], batch), mesh)

    for i in range(1, STEP):
        state, _ = step(state, share(i), key)
    copy = jax.jit(lambda x: jax.tree.map(lambda y: y + 0, x), out_shardings=layout(state))(state)
    _, metrics = step(copy, share(STEP), key)
    state, bad = step(state, share(STEP, broken=True), key)
    state, _ = step(state, share(STEP + 1), key)  # launched before the bad one is known
    values = {name: float(value) for name, value in metrics.items()}
    values["skipped_in_a_row"] = float(bad["skipped_in_a_row"])
    command = ["--x=1", f"--process_id={process}", "--num_processes", "2"]
    replay.save(folder, STEP, state, share(STEP), values, ["a"], command, SETTINGS)
    path = folder / replay.BAD / str(STEP) / replay.REPORT
    again = replay.repeat(path, step, like, mesh, jax.random.key(KEY))
    assert again["loss"] == values["loss"], (again, values)
    if process == 0:
        (folder / "loss.json").write_text(json.dumps(values))


def layout(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
