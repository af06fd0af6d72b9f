"""Which settings can work: every value of a config, and values that depend on each other.

Nothing here touches a file or a device. What takes those (data that are there, devices that a mesh
fits) is checked by whoever opens them, before anything is compiled.
"""

import math
import re

from sam2_jax import lora, methods
from sam2_jax.config_keys import Config, flat_keys, one_of, sources_by_key
from sam2_jax.metrics import SCORED
from sam2_jax.model.kernels import NAMES as KERNELS
from sam2_jax.model.variants import VARIANTS
from sam2_jax.rules import check_selectors
from sam2_jax.source_checks import check_data
from sam2_jax.types import UserError

PRECISIONS = ("float32", "bfloat16")
NOT_FINITE = ("stop", "skip")
REMATS = ("none", "frame", "full")
VERSIONS = ("2.0", "2.1")
STRIDE = 32  # of the trunk's coarsest level
SCORES = ("J&F", "J", "F")  # of an evaluation, the higher the better

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
    "seed": 0,
    "data.phases_per_epoch": 1,
    "prompts.max_cond_frames": 1,
    "prompts.max_corrected_frames": 1,
    "prompts.corrections": 0,
    "optim.warmup_steps": 0,
    "train.steps": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.accumulate": 1,
    "train.segment": 0,
    "checkpoint.every_steps": 1,
    "train.max_skipped": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "checkpoint.keep_best": 0,
    "eval.max_clips": 0,
    "eval.max_frames": 0,
    "eval.loss_clips": 0,
}
_POSITIVE = ("optim.clip_norm",)
_BELOW = ("model.attention_dropout", "model.dropout", "model.drop_path")  # 1: nothing is left
MOST = 2**31 - 1  # steps and seeds are 32-bit numbers on a device


def check(config: Config) -> None:
    """Raises `UserError` for the first value that cannot work. Touches no file, no device."""
    flat = flat_keys(config)
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"{key}={flat[key]} must be at least {least}")
        if flat[key] > MOST:
            raise UserError(f"{key}={flat[key]} must be at most {MOST}")
    for key in _PROBABILITIES:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"{key}={flat[key]} must be between 0 and 1")
    for key in _BELOW:
        if flat[key] == 1:
            raise UserError(f"{key}={flat[key]} must be less than 1, which leaves nothing")
    for key in _POSITIVE:
        if not flat[key] > 0:
            raise UserError(f"{key}={flat[key]} must be greater than 0")
    for name, weight in config.loss.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"loss.{name}={weight} must be finite and at least 0")
    check_model(config)
    check_data(config)
    check_prompts(config)
    check_optim(config)
    check_train(config)
    check_eval(config)
    check_checkpoint(config)


def check_model(config: Config) -> None:
    """`check` of the model."""
    one_of("model.variant", config.model.variant, tuple(VARIANTS))
    one_of("model.version", config.model.version, VERSIONS)
    one_of("model.attention", config.model.attention, KERNELS)
    resolution = config.model.resolution
    if resolution < STRIDE or resolution % STRIDE:
        near = max(STRIDE, round(resolution / STRIDE) * STRIDE)
        raise UserError(
            f"model.resolution={resolution} must be a multiple of {STRIDE}: take {near}"
        )


def check_prompts(config: Config) -> None:
    """`check` of what is prompted."""
    p = config.prompts
    if p.max_corrected_frames < p.max_cond_frames:
        raise UserError(
            f"prompts.max_corrected_frames={p.max_corrected_frames} must be at least "
            f"prompts.max_cond_frames={p.max_cond_frames}: prompted frames are "
            "among the corrected ones"
        )


def check_optim(config: Config) -> None:
    """`check` of the optimizer and of LoRA, as far as no parameter's name matters."""
    options = {option: config.optim[option] for option in methods.OPTIONS}
    methods.check_method(config.optim.name, options, config.optim.nesterov)
    for name in ("multiplier", "layer_decay_overrides"):
        methods.check_factors(f"optim.{name}", config.optim[name])
    check_selectors("optim.frozen", config.optim.frozen)
    lora.check(config.lora.rules, config.lora.also_train)
    if config.lora.rules and not config.checkpoint.init_from:
        raise UserError(
            "lora.rules adapts weights that there are: give them as checkpoint.init_from, or leave "
            "lora.rules empty to train from random ones"
        )


def check_train(config: Config) -> None:
    """`check` of how training runs and what it keeps."""
    for key in ("precision", "reduce_precision"):
        if config.train[key] == "float16":
            raise UserError(
                f"train.{key}=float16 loses small gradients unless the loss is scaled, which it is "
                "not here: take bfloat16, which has float32's range at the same speed"
            )
        one_of(f"train.{key}", config.train[key], PRECISIONS)
    one_of("train.remat", config.train.remat, REMATS)
    if config.train.truncate and not config.train.segment:
        raise UserError(
            "train.truncate=True ends gradients between segments, and train.segment=0 makes none: "
            "set train.segment to the number of frames to learn from together"
        )
    for name, part in sources_by_key(config).items():
        if (segment := config.train.segment) and part.num_frames % min(segment, part.num_frames):
            raise UserError(
                f"train.segment={segment} must divide {name}.num_frames={part.num_frames}, or be "
                "at least as many: change one of them"
            )
    one_of("train.not_finite", config.train.not_finite, NOT_FINITE)
    profiled, steps = config.train.profile_steps, config.train.steps
    whole = all(type(step) is int for step in profiled)
    if profiled and not (whole and len(profiled) == 2 and 0 < profiled[0] <= profiled[1] <= steps):
        raise UserError(
            f"train.profile_steps={profiled} must be empty, or the first and the last step of a "
            f"trace, whole numbers such as 10,12, and not beyond train.steps={steps}"
        )
    if not 0 <= config.train.ema_decay < 1:
        raise UserError(
            f"train.ema_decay={config.train.ema_decay} must be at least 0 (no average) and below 1"
        )


def check_eval(config: Config) -> None:
    """`check` of evaluation."""
    if 0 < config.eval.max_frames < SCORED:
        raise UserError(
            f"eval.max_frames={config.eval.max_frames} must be 0 (all) or at least {SCORED}: the "
            "first and the last frame are not scored"
        )
    if not config.eval.prompts:
        raise UserError("eval.prompts=() prompts nothing: take ('mask',), or others of the first")
    if not all(isinstance(prompt, str) for prompt in config.eval.prompts):
        raise UserError(
            f"eval.prompts={config.eval.prompts} must be names such as 'mask', 'click1'"
        )
    if len({*config.eval.prompts}) < len(config.eval.prompts):
        raise UserError(f"eval.prompts={config.eval.prompts} names one twice: each is one row")
    for name, root in config.eval.sets.items():
        if not re.fullmatch(r"(?!(mask|box|click\d+)$)[\w-]+", name):
            raise UserError(
                f"eval.sets.{name}: the name is part of rows and files and beside names of "
                "prompts: take letters, digits, _ and -, and not mask, box, click1 ..."
            )
        if not isinstance(root, str) or not root:
            raise UserError(f"eval.sets.{name}={root} must be a folder of clips")


def check_checkpoint(config: Config) -> None:
    """`check` of which checkpoints are kept."""
    c = config.checkpoint
    # Before an evaluation there is one as well
    saved = [every for every in (c.every_steps, config.train.eval_every) if every]
    if c.keep_every and all(c.keep_every % every for every in saved):
        raise UserError(
            f"checkpoint.keep_every={c.keep_every} must be a multiple of checkpoint.every_steps="
            f"{c.every_steps}, else most of the checkpoints to keep are never made: take "
            f"{max(1, round(c.keep_every / c.every_steps)) * c.every_steps}"
        )
    best = c.best
    metric = best.rpartition("/")[2]
    if metric in SCORES and c.best_is_lowest:
        raise UserError(
            f"checkpoint.best={best} with checkpoint.best_is_lowest=True would keep the worst: set "
            "it to False"
        )
    if not metric.startswith("loss"):
        return
    if not config.eval.loss_clips:
        raise UserError(
            f"checkpoint.best={best} is computed on eval.loss_clips=0 clips of each set: take "
            "some, say 16, or another metric"
        )
    if not c.best_is_lowest:
        raise UserError(
            f"checkpoint.best={best} with checkpoint.best_is_lowest=False would keep the highest "
            "loss: set it to True"
        )
