"""Worker: our training step."""

import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sam2_jax import convert, sharding, train
from sam2_jax.benchmarks import ours, serving
from sam2_jax.model.sam2 import init_params
from sam2_jax.types import Batch, PromptPlan


def make(folder: pathlib.Path) -> serving.Answer:
    """Answers {"plan": name} with the seconds of a step; {"weights": True} loads theirs."""
    setup = serving.read_setup(folder)
    serving.use_threads(setup["threads"])  # JAX counts cores when it is first used
    config: Any = ConfigDict(setup["config"])
    side = ours.make_side(config)
    everywhere = sharding.replicated(side.mesh)
    of_state = train.state_shardings(side.shapes, side.mesh)
    # As in training, and the first state too: left to JAX the second step, of a state that came out
    # of one, compiles anew
    step = jax.jit(
        ours.make_step(config, side),
        in_shardings=(of_state, everywhere, everywhere, everywhere),
        out_shardings=(of_state, everywhere),
        donate_argnums=0,
    )
    begin = jax.jit(
        functools.partial(train.init_state, optimizer=side.optimizer),
        out_shardings=of_state,
        donate_argnums=0,
    )
    clips = serving.read_arrays(folder / serving.CLIPS)
    images, masks = clips["images"], clips["masks"]
    plans = serving.read_plans(folder)
    videos, _, objects = masks.shape[:3]
    batch = jax.device_put(Batch(images, masks, np.ones((videos, objects), bool)))
    key = jax.random.key(0)
    state = begin(init_params(side.model, key))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal state
        if request.get("weights"):
            weights = serving.read_arrays(folder / serving.WEIGHTS)
            loaded = convert.from_reference(weights, side.shapes.params)
            state = begin(jax.tree.map(jax.numpy.asarray, loaded))
            return {}
        plan = jax.device_put(PromptPlan(**plans[request["plan"]]))
        start = time.perf_counter()
        state, metrics = step(state, batch, key, plan)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": float(metrics["loss"])}

    return answer


if __name__ == "__main__":
    serving.serve(make)
