"""The nano model on clips rendered on the fly, from random weights, in 24 minutes on two cores."""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "nano") -> Any:
    """Training from nothing, on masks, clicks and boxes."""
    c = default.get_config(variant)
    default.from_nothing_on_cpu(c)
    c.data.source = "synthetic"
    c.data.synthetic.speed = 0.8
    c.train.steps = 7_000
    c.train.eval_every = 2_000
    c.checkpoint.every_steps = 500
    return c
