r"""CT and other volumes, slices taken for frames.

  python scripts/train.py --config=configs/ct.py:tiny --config.data.root=FOLDER \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt

FOLDER holds JPEGImages/VOLUME/*.png and Annotations/VOLUME/*.png; or .npz files with `imgs` and
`gts`, with --config.data.source=volumes and, to evaluate at all, --config.data.eval_root=CLIPS.
Window the intensities to 8 bits before: what is not in the window is not in the picture.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Slices forwards and backwards; colours mean nothing, left and right do."""
    c = default.get_config(variant)
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    c.data.num_frames = 4
    c.data.reverse = 0.5  # a lesion is followed up and down
    c.data.max_objects = 2
    c.data.augment.hflip = 0.0
    c.data.augment.degrees = 10.0
    c.data.augment.shear = 5.0
    c.data.augment.scale = (0.9, 1.2)
    c.data.augment.jitter = (0.2, 0.2, 0.0)
    c.data.augment.frame_jitter = (0.05, 0.05, 0.0)
    c.data.augment.grayscale = 0.0
    c.prompts.prob_box = 0.7  # how readers mark lesions
    c.train.steps = 3_000
    return c
