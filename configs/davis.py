"""DAVIS 2017: a folder with `--config.data.root=DIR`, without one TensorFlow Datasets' copy."""

from typing import Any

from configs import default


def get_config(variant: str = "tiny") -> Any:
    """Fine-tuning at the defaults; `nano` trains from random weights on a CPU."""
    c = default.get_config(variant)
    c.data.source = "tfds"  # scripts take 'folder' where data.root is given
    c.train.steps = 3_000
    c.train.eval_every = 500
    if variant == "nano":
        c.model.resolution = 128
        c.model.attention_dropout = 0.0
        c.model.dropout = 0.0
        c.model.drop_path = 0.0
        c.data.num_frames = 4
        c.data.max_objects = 2
        c.data.batch_size = 2
        c.prompts.prob_points = 0.3
        c.prompts.max_cond_frames = 1
        c.prompts.max_corrected_frames = 1
        c.optim.learning_rate = ((("*",), 3e-4, 3e-6),)
        c.optim.warmup_steps = 200
        c.optim.clip_norm = 1.0
        c.train.log_every = 20
        c.train.eval_every = 1_000
        c.train.precision = "float32"
        c.train.remat = "frame"
    return c
