"""A few minutes of configs/synthetic.py: does everything work on this machine?"""

from typing import Any

from configs import synthetic
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "nano") -> Any:
    """Ends within five minutes on two cores, compilation included."""
    c = synthetic.get_config(variant)
    c.data.synthetic.eval_clips = 4
    c.data.synthetic.eval_frames = 8
    c.prompts.prob_points = 0.1  # masks, by which evaluation prompts, are learnt first
    c.optim.warmup_steps = 50
    c.train.steps = 500
    c.train.log_every = 5
    c.train.eval_every = 0
    c.checkpoint.every_steps = 100
    return c
