"""Worker: from the start of a process to the end of its first training step."""

import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

# All that scripts/train.py imports
from sam2_jax import loop, preparing, recipe, replay, sharding, train, validation  # noqa: F401
from sam2_jax.benchmarks import ours, serving
from sam2_jax.data import catalogue  # noqa: F401
from sam2_jax.model.sam2 import init_params
from sam2_jax.types import Batch

IMPORTED = time.time()


def make(folder: pathlib.Path) -> serving.Answer:
    """Answers {"started": time.time() at the process's start} with seconds and peaks by phase."""
    setup = serving.read_setup(folder)
    serving.use_threads(setup["threads"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        seconds = {"import": IMPORTED - request["started"]}
        peaks = {"import": serving.peak_bytes()}
        last = time.perf_counter()

        def done(phase: str) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds[phase], peaks[phase], last = now - last, serving.peak_bytes(), now

        config: Any = ConfigDict(setup["config"])
        side = ours.make_side(config)
        begin = jax.jit(functools.partial(train.init_state, optimizer=side.optimizer))
        state = begin(init_params(side.model, jax.random.key(0)))
        clips = serving.read_arrays(folder / serving.CLIPS)
        images, masks = clips["images"], clips["masks"]
        videos, _, objects = masks.shape[:3]
        valid = np.ones((videos, objects), bool)
        batch = sharding.put_batch(Batch(images, masks, valid), side.mesh)
        jax.block_until_ready(state)
        done("init")
        step = recipe.make_config_step(config, side.model, side.optimizer, side.mesh)
        jitted: Any = train.jit_step(step, side.shapes, side.mesh)
        traced = jitted.trace(state, batch, jax.random.key(0))
        done("trace")
        lowered = traced.lower()
        done("lower")
        compiled = lowered.compile()
        done("compile")
        jax.block_until_ready(compiled(state, batch, jax.random.key(0)))
        done("first run")
        return {"seconds": seconds, "peaks": peaks}

    return answer


if __name__ == "__main__":
    serving.serve(make)
