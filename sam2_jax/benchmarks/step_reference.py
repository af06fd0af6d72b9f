"""Worker: the reference's training step."""
# pyright: reportMissingImports=false

import pathlib
import pickle
import time
from typing import Any

import numpy as np

from sam2_jax.benchmarks import reference, serving


def make(folder: pathlib.Path) -> serving.Answer:
    """Answers {"plan": name} with the seconds of a step; {"weights": True} once, after saving."""
    setup = pickle.loads((folder / "setup.pkl").read_bytes())
    serving.use_threads(setup["threads"])
    import torch

    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    side = reference.make_side(setup["variant"], setup["resolution"])
    with np.load(folder / "clips.npz") as clips:
        batch = reference.datapoint(clips["images"], clips["masks"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("weights"):
            state = {name: x.numpy() for name, x in side.model.state_dict().items()}
            np.savez(folder / "weights.npz", **state)
            return {}
        begin = time.perf_counter()
        loss = reference.step(side, batch, setup["plans"][request["plan"]])
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    return answer


if __name__ == "__main__":
    serving.serve(make)
