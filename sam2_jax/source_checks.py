"""Which settings of training data can work; part of config_checks.py."""

import math

from sam2_jax.config_keys import Config, flat_keys, one_of
from sam2_jax.data.catalogue import KINDS
from sam2_jax.data.mixture import INTERLEAVE, RANDOM
from sam2_jax.data.sources import SKIP, STOP
from sam2_jax.metrics import SCORED
from sam2_jax.types import UserError

_SOURCE_AT_LEAST = {
    "num_frames": 1,
    "max_objects": 1,
    "batch_size": 1,
    "weight": 0,
    "min_stride": 1,
    "augment.degrees": 0,
    "augment.shear": 0,
    "augment.noise": 0,
    "augment.blur": 0,
    "folder.sample_rate": 1,
    "folder.annotated_every": 1,
    "sav.ann_every": 1,
    "synthetic.num_clips": 1,
    "synthetic.max_objects": 1,
    "synthetic.eval_clips": 1,
    "synthetic.eval_frames": SCORED,
}
_SOURCE_PROBABILITIES = (
    "reverse",
    "later_objects",
    "augment.hflip",
    "augment.vflip",
    "augment.mosaic",
    "augment.grayscale",
)


def check_data(config: Config) -> None:
    """`check` of the training data."""
    one_of("data.on_error", config.data.on_error, (STOP, SKIP))
    one_of("data.draw", config.data.draw, (INTERLEAVE, RANDOM))
    if config.data.phases_per_epoch > 1 and config.data.draw != RANDOM:
        raise UserError(
            f"data.phases_per_epoch={config.data.phases_per_epoch} divides the epochs of "
            f"data.draw={RANDOM}; {config.data.draw} has none to divide: take 1"
        )
    check_source("data", config.data)
    if config.data.weight and not config.data.mixture:
        raise UserError(
            f"data.weight={config.data.weight} is a share of the steps of a mixture, and "
            "data.mixture is empty: take 0"
        )
    for name, entry in config.data.mixture.items():
        check_source(f"data.mixture.{name}", entry)


def check_source(prefix: str, source: Config) -> None:
    """Raises `UserError` for the first setting of a source of data that cannot work."""
    flat = flat_keys(source)
    one_of(f"{prefix}.source", source.source, KINDS)
    if source.source == "synthetic":
        if given := [key for key in ("root", "include", "exclude") if source[key]]:
            raise UserError(
                f"{prefix}.{given[0]}={source[given[0]]} is of no use to {prefix}.source="
                "synthetic, which renders its clips: leave it empty, or name another source"
            )
    for key, value in flat.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(math.isfinite(n) for n in numbers if isinstance(n, int | float)):
            raise UserError(f"{prefix}.{key}={value} must be finite")
    for key, least in _SOURCE_AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"{prefix}.{key}={flat[key]} must be at least {least}")
    for key in _SOURCE_PROBABILITIES:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"{prefix}.{key}={flat[key]} must be between 0 and 1")
    for key in ("multiplier", "synthetic.speed", "instances.max_area"):
        if not flat[key] > 0:
            raise UserError(f"{prefix}.{key}={flat[key]} must be greater than 0")
    if source.max_stride < source.min_stride:
        raise UserError(
            f"{prefix}.max_stride={source.max_stride} must be at least {prefix}.min_stride="
            f"{source.min_stride}"
        )
    for key, length in (("scale", 2), ("jitter", 3), ("frame_jitter", 3), ("fill", 3)):
        value = source.augment[key]
        if len(value) != length or min(value) < 0:
            raise UserError(
                f"{prefix}.augment.{key}={value} must be {length} numbers of at least 0"
            )
    if max(source.augment.fill) > 255:
        raise UserError(f"{prefix}.augment.fill={source.augment.fill} must be 0 to 255")
    if not 0 < source.augment.scale[0] <= source.augment.scale[1]:
        raise UserError(f"{prefix}.augment.scale={source.augment.scale} must be 0 < least <= most")
