"""Worker: our tracking, as evaluation runs it."""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam2_jax import convert
from sam2_jax.benchmarks import serving
from sam2_jax.evaluate import tracker_predictor
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.predict.video import make_tracker


def make(folder: pathlib.Path) -> serving.Answer:
    """Answers {"objects": n} with the seconds until each frame's masks; {"weights": True} loads."""
    setup = serving.read_setup(folder)
    serving.use_threads(setup["threads"])  # JAX counts cores when it is first used
    model = make_sam2(setup["name"], setup["resolution"])
    tracker = make_tracker(model)
    params = init_params(model, jax.random.key(0))
    clips = serving.read_arrays(folder / serving.CLIPS)
    images, masks = clips["images"][0], clips["masks"][0, 0]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal params
        if request.get("weights"):
            weights = serving.read_arrays(folder / serving.WEIGHTS)
            params = jax.tree.map(jnp.asarray, convert.from_reference(weights, params))
            return {}
        predict = tracker_predictor(tracker, params, model.resolution)
        times = [time.perf_counter()]
        for _ in predict(iter(images), masks[: request["objects"]], len(images)):
            times.append(time.perf_counter())
        return {"seconds": np.diff(times).tolist()}

    return answer


if __name__ == "__main__":
    serving.serve(make)
