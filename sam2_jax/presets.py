"""Arguments of a config file: --config=configs/davis.py:base_plus,gpu=24.

`gpu` is a device's memory in GB. Its settings are those that change the least of a config and
whose step fits: first what is recomputed, then how many objects a clip has; never the resolution,
the frames or the number of videos.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from sam2_jax.model.variants import VARIANTS
from sam2_jax.rules import nearest
from sam2_jax.types import UserError

SIZES = (8, 12, 16, 24, 40, 48, 80)  # GB


class Limits(NamedTuple):
    """What fits, for one video of 8 frames and 1024 pixels a device."""

    remat: str
    objects: int = 3  # at most


NONE, FRAME, FULL = Limits("none"), Limits("frame"), Limits("full")
# By memory_estimate.py, with a third of the estimate to spare. What is not here does not fit.
FITS: dict[str, dict[int, Limits]] = {
    "tiny": {8: FULL, 12: FULL, 16: FRAME, 24: FRAME, 40: NONE, 48: NONE, 80: NONE},
    "small": {8: FULL, 12: FULL, 16: FULL, 24: FRAME, 40: NONE, 48: NONE, 80: NONE},
    "base_plus": {
        8: Limits("full", objects=2),
        12: FULL,
        16: FULL,
        24: FULL,
        40: FRAME,
        48: NONE,
        80: NONE,
    },
    "large": {24: FULL, 40: FULL, 48: FULL, 80: FULL},
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
    config.train.remat = table[gpu].remat
    for source in (config.data, *config.data.mixture.values()):
        source.max_objects = min(source.max_objects, table[gpu].objects)
