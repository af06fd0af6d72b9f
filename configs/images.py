r"""Images and their masks, no video: clicks and boxes on single frames.

  python scripts/train.py --config=configs/images.py:tiny --config.data.root=FOLDER \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt --config.data.eval_root=DAVIS

FOLDER holds images/NAME.jpg and masks/NAME.png, or masks/NAME/*.png, one for each object. Else
  --config.data.source=coco --config.data.root=IMAGES --config.data.instances.annotations=JSON
  --config.data.source=sa1b --config.data.root=FOLDER
Only the image side of the model is trained: what is of memory keeps its weights, so that the
result still tracks. Evaluation needs clips, eval_root; without it there is none.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Batches of images, many objects each."""
    c = default.get_config(variant)
    if variant == "nano":
        default.from_nothing_on_cpu(c)
    c.data.source = "pictures"
    c.data.num_frames = 1
    c.data.batch_size = 4
    c.data.max_objects = 8
    c.train.steps = 5_000
    return c
