"""The nano model on clips rendered on the fly, from random weights, in 45 minutes on two cores."""

from typing import Any

from configs import default


def get_config(variant: str = "nano") -> Any:
    """Rates are those of training from nothing, far above the fine-tuning defaults."""
    c = default.get_config(variant)
    c.model.resolution = 128
    c.model.attention_dropout = 0.0
    c.model.dropout = 0.0
    c.model.drop_path = 0.0

    c.data.source = "synthetic"
    c.data.num_frames = 4
    c.data.max_objects = 2
    c.data.batch_size = 2
    c.data.synthetic.speed = 0.8

    # Evaluation gives the first frame's mask: so does training
    c.prompts.prob_points = 0.0
    c.prompts.max_cond_frames = 1
    c.prompts.max_corrected_frames = 1

    c.optim.learning_rate = ((("*",), 6e-4, 6e-6),)
    c.optim.warmup_steps = 200
    c.optim.clip_norm = 1.0

    c.train.steps = 8_000
    c.train.log_every = 20
    c.train.eval_every = 2_000
    c.train.precision = "float32"
    c.train.remat = "frame"  # on a CPU also the faster choice: less to store and fetch
    c.checkpoint.every_steps = 500
    return c
