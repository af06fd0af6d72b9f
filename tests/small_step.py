"""A step that compiles fast, for tests of reports."""

from configs import mose
from sam2_jax import config as config_lib

DEVICES = 4  # of the tests; see conftest.py


def small_config(frames=2, fsdp=2, **changes):
    """nano on masks alone, which compiles fastest."""
    config = mose.get_config("nano")
    config.model.resolution = 64
    config.data.num_frames, config.data.max_objects = frames, 1
    config.data.batch_size = DEVICES
    config.prompts.prob_points = 0.0
    config.mesh.fsdp = fsdp
    config.update_from_flattened_dict(changes)
    return config_lib.finish(config)
