"""Keys of a config: all of them by their dotted names, and what they may be set to."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from sam2_jax.rules import nearest
from sam2_jax.types import UserError

Config = Any  # a ConfigDict, of whose attributes a type checker knows nothing


def flat_keys(config: Config, prefix: str = "") -> dict[str, Any]:
    """Leaves of a config by dotted key."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flat_keys(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def one_of(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raises `UserError`, which names the nearest choice, unless `value` is one of them."""
    if value not in choices:
        raise UserError(
            f"{key}='{value}' is unknown: did you mean '{nearest(str(value), choices)}'? "
            f"(of {', '.join(choices)})"
        )


def sources_by_key(config: Config) -> dict[str, Any]:
    """Settings of every source of training data, by their place in the config."""
    mixture = {f"data.mixture.{name}": entry for name, entry in config.data.mixture.items()}
    return mixture or {"data": config.data}
