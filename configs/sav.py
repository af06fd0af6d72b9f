r"""SA-V, videos alone: JSON masklets beside the mp4 files as they are handed out.

  python scripts/train.py --config=configs/sav.py:tiny --config.data.root=SAV \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt --config.data.eval_root=DAVIS

SAV is the folder with sav_000, sav_001 ... or some of them. mp4 files are decoded while training;
many epochs go faster from packed frames (scripts/prepare_data.py, then
--config.data.source=packed). --config.data.sav.annotations=auto takes the automatic masklets.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Eight frames of six a second, three objects: the video half of configs/mixture.py."""
    c = default.get_config(variant)
    c.data.source = "sav"
    c.data.augment.mosaic = 0.1
    c.train.steps = 50_000  # about once through the 50,583 videos of the training set
    c.train.eval_every = 2_500
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    return c
