"""Worker: the reference's training step."""
# pyright: reportMissingImports=false

import pathlib
import time
from typing import Any

import numpy as np

from sam2_jax.benchmarks import reference, serving


def make(folder: pathlib.Path) -> serving.Answer:
    """Answers {"plan": name} with the seconds of a step; {"weights": True} once, after saving."""
    setup = serving.read_setup(folder)
    serving.use_threads(setup["threads"])
    import torch

    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    side = reference.make_side(setup["variant"], setup["resolution"])
    clips = serving.read_arrays(folder / serving.CLIPS)
    batch = reference.datapoint(clips["images"], clips["masks"])
    plans = serving.read_plans(folder)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("weights"):
            state = {name: x.numpy() for name, x in side.model.state_dict().items()}
            np.savez(folder / serving.WEIGHTS, **state)
            return {}
        begin = time.perf_counter()
        loss = reference.step(side, batch, plans[request["plan"]], setup["precision"])
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    return answer


if __name__ == "__main__":
    serving.serve(make)
