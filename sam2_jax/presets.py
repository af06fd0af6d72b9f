"""Arguments of a config file: --config=configs/davis.py:base_plus,gpu=24.

`gpu` is the memory of the one device in GB; gpu=8x24, that of each of eight. It sets what the
backward pass computes again (train.remat), as little as fits, and in how many parts a device's
videos are worked off (train.accumulate), as few as fit; never the resolution, the frames, the
objects or the number of videos.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sam2_jax import memory_estimate
from sam2_jax.config_checks import REMATS
from sam2_jax.model.variants import VARIANTS
from sam2_jax.rules import nearest
from sam2_jax.types import UserError

SIZES = (8, 12, 16, 24, 40, 48, 80)  # GB
GB = 10**9
# Of a device's memory, what an estimate is to stay within: JAX takes as much of a GPU, and an
# estimate may be too low by about the rest. Only the leanest setting may take more.
SHARE = 0.75


class Machine(NamedTuple):
    """What `gpu` says."""

    gigabytes: int  # of each device
    devices: int = 1

    def __str__(self) -> str:
        """As it was typed."""
        return f"{self.devices}x{self.gigabytes}" if self.devices > 1 else str(self.gigabytes)


def parse(argument: str) -> tuple[str, Machine | None]:
    """(variant or '', machine or None) of what follows the colon.

    Raises:
        UserError: an argument that there is not, or a value that it cannot have.
    """
    variant, machine = "", None
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
        match = re.fullmatch(r"(?:([1-9]\d*)x)?(\d+)", value)
        if not match or int(match[2]) not in SIZES:
            raise UserError(
                f"--config=...:{argument}: gpu={value} must be one of {', '.join(map(str, SIZES))} "
                "(GB; take the next smaller one), or, as 8x24, a number of such devices"
            )
        machine = Machine(int(match[2]), int(match[1] or 1))
    if variant and variant not in VARIANTS:
        raise UserError(
            f"--config=...:{argument}: variant '{variant}' is unknown: did you mean "
            f"'{nearest(variant, tuple(VARIANTS))}'? (of {', '.join(VARIANTS)})"
        )
    return variant, machine


def with_arguments(get_config: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a config file's `get_config(variant)` take all arguments, in one string."""

    @functools.wraps(get_config)
    def parsed(argument: str = "") -> Any:
        variant, machine = parse(argument)
        config = get_config(variant) if variant else get_config()
        if machine is not None:
            fit(config, machine)
        return config

    return parsed


def fit(config: Any, machine: Machine) -> None:
    """Brings a config within the memory of a machine, by the estimate of its step.

    Raises:
        UserError: nothing that may be set here does.
    """
    limit = machine.gigabytes * GB
    sources = memory_estimate.sources(config).values()
    # Of each source, what every device is dealt of a batch, all to be worked off in equal parts
    videos = math.gcd(*(max(1, source.batch_size // machine.devices) for source in sources))
    parts = [n for n in range(1, videos + 1) if videos % n == 0]
    settings = [(remat, n) for remat in REMATS for n in parts]

    def needed(setting: tuple[str, int]) -> int:
        config.train.remat, config.train.accumulate = setting
        return memory_estimate.total(memory_estimate.unsharded(config, machine.devices))

    if any(needed(setting) <= SHARE * limit for setting in settings):
        return  # with the first that does
    if needed(min(settings, key=needed)) > limit:
        raise UserError(_too_much(config, machine))


def _too_much(config: Any, machine: Machine) -> str:
    """What a config takes that is at its leanest, and what is to be lowered."""
    found = memory_estimate.unsharded(config, machine.devices)
    largest = sorted(found, key=lambda name: -found[name])[:3]
    shares = ", ".join(f"{name} {found[name] / GB:.1f}" for name in largest)
    name, source = memory_estimate.heaviest_source(config)
    prefix = f"data.mixture.{name}" if config.data.mixture else name
    lower = f"lower model.resolution, {prefix}.max_objects"
    if source.num_frames > 1:
        lower += f" or {prefix}.num_frames, or set train.segment"
    return (
        f"gpu={machine}: {config.model.variant} takes about "
        f"{memory_estimate.total(found) / GB:.1f} GB a device at the least ({shares}): leave gpu "
        f"out, set train.remat={config.train.remat} and "
        f"train.accumulate={config.train.accumulate}, and {lower}"
        + ("; or take a smaller variant" if config.model.variant != "tiny" else "")
    )
