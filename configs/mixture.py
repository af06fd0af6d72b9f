r"""SA-V's videos and SA-1B's images, as SAM 2 was trained on both: frames in turn 8 and 1.

  python scripts/train.py --config=configs/mixture.py:tiny --config.data.mixture.sav.root=SAV \
      --config.data.mixture.sa1b.root=SA1B --config.data.eval_root=DAVIS \
      --config.checkpoint.init_from=sam2.1_hiera_tiny.pt

The batch of a step comes from one source: --config.data.mixture.sav.batch_size and .sa1b.batch_size
count over all devices, at least one for each.
"""

from typing import Any

from configs import default
from sam2_jax.presets import with_arguments


@with_arguments
def get_config(variant: str = "tiny") -> Any:
    """Shares of the steps as of the two public sets in the paper's mixture (arXiv 2408.00714 D.2).

    Any other source is added as another entry, each with its own frames, objects, batch size and
    augmentation.
    """
    c = default.get_config(variant)
    video, image = default.source(), default.source()
    video.source = "sav"
    video.weight = 0.8
    video.augment.mosaic = 0.1
    image.source = "sa1b"
    image.num_frames = 1
    image.max_objects = 64
    image.weight = 0.2
    image.instances.max_area = 0.9  # masks that cover nearly the whole image teach little
    c.data.mixture.sav = video
    c.data.mixture.sa1b = image
    c.train.steps = 50_000
    c.train.eval_every = 2_500
    if variant == "nano":
        default.from_nothing_on_cpu(c)
        for entry in (video, image):
            default.plain(entry)
            entry.max_objects = 2
            entry.batch_size = 2
        video.num_frames = 4
    return c
