"""Clips to measure on: rendered, with objects whose masks are sensible."""

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.types import UserError

TRIES = 500  # clips looked at for one with enough objects
PROBE = 64  # pixels; a scene is the same at every resolution


def render(
    videos: int, frames: int, objects: int, resolution: int
) -> tuple[UInt8[np.ndarray, "b t h w 3"], Bool[np.ndarray, "b t o h w"]]:
    """Images and masks of clips that show all their objects on the first frame.

    Raises UserError where no clip has so many.
    """
    probe, source = (SyntheticSource(TRIES, frames, size, objects) for size in (PROBE, resolution))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for index in range(TRIES):
        visible = probe.objects(index, 0)
        if len(visible) == objects:
            found.append(source.read(index, range(frames), visible))
        if len(found) == videos:
            images, masks = zip(*found, strict=True)
            return np.stack(images), np.stack(masks)
    raise UserError(
        f"--objects={objects}: of {TRIES} rendered clips only {len(found)} show so many on their "
        f"first frame, and {videos} are needed: ask for fewer objects"
    )
