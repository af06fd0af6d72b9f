"""Worker: the reference's video predictor."""
# pyright: reportMissingImports=false

import pathlib
import time
from typing import Any
from unittest import mock

import numpy as np

from sam2_jax.benchmarks import reference, serving


def make(folder: pathlib.Path) -> serving.Answer:
    """Answers {"objects": n} with the seconds until each frame's masks; {"weights": True} saves."""
    setup = serving.read_setup(folder)
    serving.use_threads(setup["threads"])
    import torch

    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    predictor = reference.make_predictor(setup["variant"], setup["resolution"])
    clips = serving.read_arrays(folder / serving.CLIPS)
    images, masks = clips["images"][0], clips["masks"][0, 0]
    frames = reference.normalised(images)
    where = "sam2.sam2_video_predictor.load_video_frames"
    side = images.shape[1]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("weights"):
            state = {name: x.numpy() for name, x in predictor.state_dict().items()}
            np.savez(folder / serving.WEIGHTS, **state)
            return {}
        with mock.patch(where, return_value=(frames, side, side)):
            state = predictor.init_state("")
        for k in range(request["objects"]):
            predictor.add_new_mask(state, 0, k, masks[k])
        times = [time.perf_counter()]
        for _, _, logits in predictor.propagate_in_video(state):
            (logits > 0).numpy()
            times.append(time.perf_counter())
        return {"seconds": np.diff(times).tolist()}

    return answer


if __name__ == "__main__":
    serving.serve(make)
