r"""MOSE: the reference's own fine-tuning recipe, number for number.

  python scripts/train.py --config=configs/mose.py:base_plus --config.data.root=MOSE/train \
      --config.checkpoint.init_from=sam2.1_hiera_base_plus.pt

It is one for eight devices with a clip on each. On one device --config.train.accumulate=8 works
the same batch off clip by clip, on two =4, and so on.
MOSE's validation masks are not public, and the reference holds 200 training videos back: give the
names of those to train on with --config.data.include=LIST, and a folder of others with
--config.data.eval_root; without either the last tenth of the clips is held back.
Source: facebookresearch/sam2@2b90b9f sam2.1_hiera_b+_MOSE_finetune.yaml.
"""

import math
from typing import Any

from configs import default
from sam2_jax.presets import with_arguments

EPOCHS = 40
MULTIPLIER = 2  # an epoch shows every clip twice
CLIPS = 1246  # in its list of training clips
DEVICES = 8  # one clip on each


@with_arguments
def get_config(variant: str = "base_plus") -> Any:
    """`train.steps` are those of the recipe, whose batch is 8 clips, one a device."""
    c = default.get_config(variant)
    c.data.batch_size = DEVICES
    c.data.multiplier = float(MULTIPLIER)
    # Its sampler repeats a few clips, so that all devices have as many: an epoch is rounded up
    c.train.steps = EPOCHS * math.ceil(MULTIPLIER * CLIPS / DEVICES)
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    return c
