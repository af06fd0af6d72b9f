"""From a command line to a checked config: the only file that knows all keys.

A script defines its flags, then calls `run(main)`; `main(config)` gets a locked ConfigDict.
Whatever the user can mend ends as one line `error: ...` with exit status 2, flags included.
"""

import argparse
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sam2_jax import lora, methods
from sam2_jax.data.catalogue import KINDS
from sam2_jax.data.mixture import INTERLEAVE, RANDOM
from sam2_jax.data.sources import SKIP, STOP
from sam2_jax.metrics import SCORED
from sam2_jax.model.variants import VARIANTS
from sam2_jax.rules import nearest
from sam2_jax.types import UserError

Config = Any  # a ConfigDict, of whose attributes a type checker knows nothing
PRECISIONS = ("float32", "bfloat16")
REMATS = ("none", "frame", "full")
VERSIONS = ("2.0", "2.1")
STRIDE = 32  # of the trunk's coarsest level

_PROBABILITIES = (
    "prompts.prob_points",
    "prompts.prob_box",
    "prompts.prob_from_truth",
    "data.max_bad",
    "optim.layer_decay",
    "optim.layer_decay_min",
    "model.attention_dropout",
    "model.dropout",
    "model.drop_path",
)
_AT_LEAST = {
    "data.workers": 0,
    "data.phases_per_epoch": 1,
    "prompts.max_cond_frames": 1,
    "prompts.max_corrected_frames": 1,
    "prompts.corrections": 0,
    "optim.warmup_steps": 0,
    "train.steps": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.accumulate": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "eval.max_clips": 0,
    "eval.max_frames": 0,
}
_SOURCE_AT_LEAST = {
    "num_frames": 1,
    "max_objects": 1,
    "batch_size": 1,
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
_POSITIVE = ("optim.clip_norm",)


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


def check_source(prefix: str, source: Config) -> None:
    """Raises `UserError` for the first setting of a source of data that cannot work."""
    flat = flat_keys(source)
    one_of(f"{prefix}.source", source.source, KINDS)
    for key, least in _SOURCE_AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"{prefix}.{key}={flat[key]} must be at least {least}")
    for key in _SOURCE_PROBABILITIES:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"{prefix}.{key}={flat[key]} must be between 0 and 1")
    for key in ("multiplier", "synthetic.speed"):
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
    if not 0 < source.augment.scale[0] <= source.augment.scale[1]:
        raise UserError(f"{prefix}.augment.scale={source.augment.scale} must be 0 < least <= most")


def check(config: Config) -> None:
    """Raises `UserError` for the first value that cannot work. Touches no file, no device."""
    flat = flat_keys(config)
    one_of("model.variant", config.model.variant, tuple(VARIANTS))
    one_of("model.version", config.model.version, VERSIONS)
    one_of("data.on_error", config.data.on_error, (STOP, SKIP))
    one_of("data.draw", config.data.draw, (INTERLEAVE, RANDOM))
    if config.data.phases_per_epoch > 1 and config.data.draw != RANDOM:
        raise UserError(
            f"data.phases_per_epoch={config.data.phases_per_epoch} divides the epochs of "
            f"data.draw={RANDOM}; {config.data.draw} has none to divide: take 1"
        )
    check_source("data", config.data)
    for name, entry in config.data.mixture.items():
        check_source(f"data.mixture.{name}", entry)
    one_of("train.precision", config.train.precision, PRECISIONS)
    one_of("train.remat", config.train.remat, REMATS)
    resolution = config.model.resolution
    if resolution < STRIDE or resolution % STRIDE:
        near = max(STRIDE, round(resolution / STRIDE) * STRIDE)
        raise UserError(
            f"model.resolution={resolution} must be a multiple of {STRIDE}: take {near}"
        )
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"{key}={flat[key]} must be at least {least}")
    for key in _PROBABILITIES:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"{key}={flat[key]} must be between 0 and 1")
    for key in _POSITIVE:
        if not flat[key] > 0:
            raise UserError(f"{key}={flat[key]} must be greater than 0")
    if 0 < config.eval.max_frames < SCORED:
        raise UserError(
            f"eval.max_frames={config.eval.max_frames} must be 0 (all) or at least {SCORED}: the "
            "first and the last frame are not scored"
        )
    if config.mesh.model != 1:
        raise UserError(
            f"mesh.model={config.mesh.model}: one video is not split over devices yet: take 1"
        )
    if not 0 <= config.train.ema_decay < 1:
        raise UserError(
            f"train.ema_decay={config.train.ema_decay} must be at least 0 (no average) and below 1"
        )
    lora.check(config.lora.rules, config.lora.also_train)
    if config.lora.rules and not config.checkpoint.init_from:
        raise UserError(
            "lora.rules adapts weights that there are: give them as checkpoint.init_from, or leave "
            "lora.rules empty to train from random ones"
        )
    if config.prompts.max_corrected_frames < config.prompts.max_cond_frames:
        raise UserError(
            f"prompts.max_corrected_frames={config.prompts.max_corrected_frames} must be at least "
            f"prompts.max_cond_frames={config.prompts.max_cond_frames}: prompted frames are "
            "among the corrected ones"
        )
    options = {option: flat[f"optim.{option}"] for option in methods.OPTIONS}
    methods.check_method(config.optim.name, options, config.optim.nesterov)
    for key in ("optim.multiplier", "optim.layer_decay_overrides"):
        methods.check_factors(key, flat[key])


def split_arguments(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config (the last one counts) and all other arguments."""
    path, rest, skip = "", [], False
    for i, arg in enumerate(argv):
        if skip:
            skip = False
        elif match := re.fullmatch(r"--?config=(.*)", arg):
            path = match[1]
        elif re.fullmatch(r"--?config", arg) and i + 1 < len(argv):
            path, skip = argv[i + 1], True
        else:
            rest.append(arg)
    return path, rest


def load_file(path: str) -> Config:
    """The config of `FILE.py` or `FILE.py:VARIANT`, locked, unchecked."""
    file, _, variant = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={path}: there is no file '{file}' here; see configs/, e.g. configs/smoke.py"
        )
    if variant:
        one_of("variant", variant, tuple(VARIANTS))
    get_config = runpy.run_path(file)["get_config"]
    return (get_config(variant) if variant else get_config()).lock()


def check_overrides(path: str, arguments: Sequence[str]) -> None:
    """Raises `UserError` for the first --config.a.b that the config file does not have."""
    keys = list(flat_keys(load_file(path)))
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and match[1] not in keys:
            raise UserError(
                f"unknown config key '{match[1]}': did you mean '{nearest(match[1], keys)}'?"
            )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parser with every error as `UserError`, keys named as they were typed."""
    path, rest = split_arguments(argv[1:])
    wants_help = any(re.fullmatch(r"--?help(full|short|xml)?", argument) for argument in rest)
    if not path and not wants_help:
        raise UserError("--config=FILE.py[:VARIANT] is missing, e.g. --config=configs/smoke.py")
    if path:
        check_overrides(path, rest)
    # --config comes first whatever the order typed: overrides apply to what it loads.
    ordered = [argv[0], *([f"--config={path}"] if path else []), *rest]
    sys.argv[1:] = ordered[1:]  # config_flags looks for overrides there
    try:
        left = flags.FLAGS(ordered)
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(" ".join(str(e).split())) from e
    except SystemExit:  # help was shown; absl calls that a failure
        sys.exit(0)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl.app would show the libraries' own chatter
    if len(left) > 1:
        raise UserError(f"argument '{left[1]}' is not a flag: flags look like --name=value")
    return left


def finish(config: Config) -> Config:
    """Settles what depends on other keys, checks, locks."""
    if config.data.source == "tfds" and config.data.root:
        config.data.source = "folder"  # configs/davis.py: a folder wins over the downloaded copy
    check(config)
    return config.lock()


def default_workdir(path: str, config: Config) -> str:
    """runs/CONFIG-VARIANT from the value of --config."""
    return f"runs/{pathlib.Path(path.partition(':')[0]).stem}-{config.model.variant}"


def to_json(config: Config) -> str:
    """The config as `config.json` holds it; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def run(main: Callable[[Config], int | None]) -> None:
    """Runs a script: parses flags, loads and checks --config, turns `UserError` into exit 2.

    --help prints the docstring of the script and its flags.
    """
    config_flags.DEFINE_config_file("config", help_string="config file: FILE.py or FILE.py:VARIANT")
    # A flag of the script's own, for its --help.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])

    def wrapped(argv: Sequence[str]) -> int | None:
        del argv
        try:
            return main(finish(flags.FLAGS.config))
        except UserError as e:
            return fail(e)

    try:
        app.run(wrapped, flags_parser=parse_flags)
    except UserError as e:
        sys.exit(fail(e))


class Parser(argparse.ArgumentParser):
    """Flags of a script without a config: `about` is its --help, a wrong flag a `UserError`."""

    def __init__(self, about: str | None):
        super().__init__(
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def fail(error: UserError) -> int:
    """Prints the one line and gives the exit status."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2
