r"""DAVIS 2017, or 2016.

  python scripts/train.py --config=configs/davis.py:tiny --config.data.root=DAVIS \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt

Without --config.data.root TensorFlow Datasets' copy is read, if that has been prepared. Trained on
the train list, evaluated on the val list.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Fine-tuning at the defaults; `nano` trains from random weights on a CPU."""
    c = default.get_config(variant)
    c.data.source = "tfds"  # scripts take 'folder' where data.root is given
    c.train.steps = 3_000
    c.train.eval_every = 500
    if variant == "nano":
        default.from_nothing_on_cpu(c)
        c.train.eval_every = 1_000
    return c
