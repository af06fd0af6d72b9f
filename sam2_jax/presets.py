"""Arguments of a config file: --config=configs/davis.py:base_plus,gpu=24.

`gpu` is a device's memory in GB. It sets what the backward pass computes again (train.remat), as
little as fits; never the resolution, the frames, the objects or the number of videos.
"""

import functools
from collections.abc import Callable
from typing import Any

from sam2_jax.model.variants import VARIANTS
from sam2_jax.rules import nearest
from sam2_jax.types import UserError

SIZES = (8, 12, 16, 24, 40, 48, 80)  # GB


# What to recompute for one video of 8 frames, 3 objects, 1024 pixels a device, by variant and GB.
# base_plus by its reports (28.4 GB with frame, 3.9 GB with full, and 0.8 GB of state that they
# share), the others by memory_estimate.py with a third to spare. What is not here does not fit.
def _fits(**limits: int) -> dict[int, str]:
    """GB of a device -> the last policy whose least GB it has."""
    return {gpu: name for name, least in limits.items() for gpu in SIZES if gpu >= least}


FITS = {
    "tiny": _fits(full=8, frame=16, none=40),
    "small": _fits(full=8, frame=24, none=40),
    "base_plus": _fits(full=8, frame=40, none=80),
    "large": _fits(full=24),
}


def parse(argument: str) -> tuple[str, int | None]:
    """(variant or '', GB or None) of what follows the colon.

    Raises:
        UserError: an argument that there is not, or a value that it cannot have.
    """
    variant, gpu = "", None
    for i, part in enumerate(argument.split(",")):
        name, equals, value = part.partition("=")
        if not equals and i == 0:
            variant = part
            continue
        if name != "gpu":
            raise UserError(
                f"--config=...:{argument}: there is no argument '{part}'; there are a variant "
                f"({', '.join(VARIANTS)}), then gpu=GB of a device's memory"
            )
        if value not in map(str, SIZES):
            raise UserError(
                f"--config=...:{argument}: gpu={value} must be one of {', '.join(map(str, SIZES))} "
                "(GB; take the next smaller one)"
            )
        gpu = int(value)
    if variant and variant not in VARIANTS:
        raise UserError(
            f"--config=...:{argument}: variant '{variant}' is unknown: did you mean "
            f"'{nearest(variant, tuple(VARIANTS))}'? (of {', '.join(VARIANTS)})"
        )
    return variant, gpu


def with_arguments(get_config: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a config file's `get_config(variant)` take all arguments, in one string."""

    @functools.wraps(get_config)
    def parsed(argument: str = "") -> Any:
        variant, gpu = parse(argument)
        config = get_config(variant) if variant else get_config()
        if gpu is not None:
            fit(config, gpu)
        return config

    return parsed


def fit(config: Any, gpu: int) -> None:
    """Brings a config within the memory of a device of so many GB.

    Raises:
        UserError: the variant does not fit it.
    """
    table = FITS.get(config.model.variant)
    if table is None:
        return  # nano fits everything
    if gpu not in table:
        raise UserError(
            f"gpu={gpu}: {config.model.variant} takes at least {min(table)} GB: take a smaller "
            f"variant, or set model.resolution, data.num_frames and train.remat=full yourself"
        )
    config.train.remat = table[gpu]
