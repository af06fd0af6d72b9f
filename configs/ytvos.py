r"""YouTube-VOS 2019: flat folders in which every fifth frame has a mask.

  python scripts/train.py --config=configs/ytvos.py:tiny --config.data.root=YTVOS/train \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt

The training set as it is handed out has only the frames with masks. Of its full-frame version
(train_all_frames) take every fifth: --config.data.folder.annotated_every=5. The masks of the
validation set are not public: the last tenth of the clips is held back, or name a folder of others
with --config.data.eval_root.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Fine-tuning at the defaults, over clips about three times in all."""
    c = default.get_config(variant)
    c.data.reverse = 0.5  # masks are five frames apart: motion is large either way
    c.train.steps = 10_000
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    return c
