r"""A folder of one's own video, a few clips or a few hundred.

  python scripts/train.py --config=configs/own.py:tiny --config.data.root=FOLDER \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt

FOLDER holds JPEGImages/CLIP/*.jpg (or .png) and Annotations/CLIP/*.png, one mask for every frame,
0 for background and a number for each object. Masks for every fifth frame only:
--config.data.folder.annotated_every=5. Look at it first with scripts/check_data.py, same flags.
The last tenth of the clips is held back to evaluate on; --config.data.eval_root=DIR names others.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Fine-tuning that makes much of few clips, evaluated often: little data is soon learnt."""
    c = default.get_config(variant)
    c.data.reverse = 0.5
    c.data.max_stride = 2  # also at twice the speed
    c.data.later_objects = 0.2  # what comes in later is to be found, too
    c.train.steps = 2_000
    c.train.eval_every = 200
    c.checkpoint.every_steps = 200
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    return c
