"""The settings that a checkpoint was made with, and which may change when its run goes on.

They are in every checkpoint. A workdir's config.json has those of its last start, and counts where
the checkpoint does not say.

| changed | what happens |
|---|---|
| `model.variant`, `version`, `resolution` | error: another model |
| `optim.name`, `lora.rules`, `lora.also_train` | error: the checkpoint holds the state of the old |
| other `optim.*` (frozen globs, groups) | error if the optimizer's state has other arrays then |
| `seed`, `data.draw`, batch sizes, shares | error: the position in the data is counted by these |
| clips trained on | error, see data/loader.py; their folder and how they are packed may change |
| `train.ema_decay` | goes on: a new average begins as a copy, an old one is left behind |
| everything else, keys added or gone | goes on, and is shown |
"""

import fnmatch
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sam2_jax import checkpoint, records
from sam2_jax.types import UserError, listed

CONFIG = "config.json"
MEND = "put back what scripts/train.py wrote, or delete it to go on with the settings given now"
ABSENT = "not set"
# Globs over dotted keys, and why a run cannot go on with another value
FIXED = (
    (("model.variant", "model.version", "model.resolution"), "it is a run of another model"),
    (("optim.name",), "its checkpoints hold the state of that optimizer"),
    (("lora.rules", "lora.also_train"), "its checkpoints hold what these train, and no more"),
)
STREAM = "its position in the training data is counted in the stream that these make"
SHARED = ("seed", "data.draw", "data.phases_per_epoch")
ALONE = ("data.batch_size", "data.multiplier")  # of a single source
MIXED = tuple(f"data.mixture.*.{key}" for key in ("batch_size", "weight", "multiplier"))


def write_config(workdir: pathlib.Path, text: str) -> None:
    """Writes the workdir's config.json, whole or not at all; makes the workdir if need be."""
    workdir.mkdir(parents=True, exist_ok=True)
    records.replace(workdir / CONFIG, text)


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the workdir's config.json holds, None if there is none; `UserError` if it is torn."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): {MEND}") from e
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: {MEND}")
    return config


def settings_before(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The settings, nested, of what a workdir goes on from; None if it holds nothing.

    Raises `UserError` where they are damaged.
    """
    step = checkpoint.latest_step(workdir)
    saved = None if step is None else checkpoint.read_settings(workdir, step)
    return read_config(workdir) if saved is None else saved


def changed_keys(workdir: pathlib.Path, flat: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> 'old -> new', of all in which `flat` differs from `settings_before`.

    Keys that only one of them has are among these.
    """
    config = settings_before(workdir)
    return {} if config is None else differences(config, flat)


def differences(config: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> 'old -> new', of all in which `flat` differs from nested settings of JSON."""
    before = _flat(config)
    now = json.loads(json.dumps(dict(flat)))
    return {
        key: f"{_shown(before, key)} -> {_shown(now, key)}"
        for key in [*now, *(key for key in before if key not in now)]
        if _shown(before, key) != _shown(now, key)
    }


def check(workdir: pathlib.Path, flat: Mapping[str, Any]) -> None:
    """Raises `UserError` for a changed setting with which the run in a workdir cannot go on."""
    mixed = any(key.startswith("data.mixture.") for key in flat)
    stream = (*SHARED, *(MIXED if mixed else ALONE))
    changed = changed_keys(workdir, flat)
    for globs, why in (*FIXED, (stream, STREAM)):
        found = [
            f"{key}: {change}"
            for key, change in changed.items()
            if any(fnmatch.fnmatchcase(key, glob) for glob in globs)
            # A key of a newer version, which had no other value before
            and not change.startswith(f"{ABSENT} ->")
        ]
        if found:
            raise UserError(
                f"{workdir} cannot go on with what has changed ({listed(found)}): {why}; take the "
                "old value, or another --workdir with --config.checkpoint.init_from=OLD_WORKDIR"
            )


def optimizer_changes(changed: Mapping[str, str]) -> str:
    """What has changed of settings that decide which arrays the optimizer's state has, in words."""
    keys = [f"{key}: {change}" for key, change in changed.items() if key.startswith("optim.")]
    return listed(keys) if keys else "optim.*"


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    found = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else ABSENT
