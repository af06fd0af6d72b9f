r"""Cells under a microscope: many small objects that touch, divide, enter and leave.

  python scripts/train.py --config=configs/cells.py:tiny --config.data.root=FOLDER \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt

FOLDER holds JPEGImages/CLIP/*.png and Annotations/CLIP/*.png (16-bit masks for more than 255
cells). The last tenth of the clips, at least one, is held back to evaluate on. Of a single clip
none can be: name others with --config.data.eval_root.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Short clips, any orientation, brightness that differs; cells that appear later count."""
    c = default.get_config(variant)
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    c.data.num_frames = 4  # recordings are short
    c.data.max_objects = 6
    c.data.reverse = 0.5
    c.data.later_objects = 0.3
    c.data.augment.vflip = 0.5
    c.data.augment.degrees = 180.0
    c.data.augment.shear = 5.0
    c.data.augment.scale = (0.8, 1.5)
    c.data.augment.jitter = (0.3, 0.3, 0.0)
    c.data.augment.frame_jitter = (0.1, 0.1, 0.0)
    c.data.augment.grayscale = 0.0
    c.data.augment.noise = 4.0
    c.train.steps = 3_000
    return c
