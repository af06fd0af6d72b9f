"""From a config to the optimizer and the step that it describes."""

import bisect
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sam2_jax import lora, losses, memory, optim, partition, prompts, rules, sharding
from sam2_jax.config_keys import sources_by_key
from sam2_jax.encode import Shared
from sam2_jax.model.classes import module_classes
from sam2_jax.model.kernels import Size, described, make_kernel
from sam2_jax.model.sam2 import NUM_MEMORIES, Sam2, init_params, make_sam2
from sam2_jax.objective import make_loss
from sam2_jax.train import (
    Params,
    RandomKey,
    State,
    TrainStep,
    init_state,
    make_train_step,
)
from sam2_jax.types import PromptPlan, UserError


def make_optim_settings(config: Any) -> optim.OptimSettings:
    """From the config's `model`, `optim` and `train` sections."""
    o = config.optim
    m = config.model
    return optim.OptimSettings(
        name=o.name,
        learning_rate=o.learning_rate,
        weight_decay=o.weight_decay,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        momentum=o.momentum,
        decay_rate=o.decay_rate,
        nesterov=o.nesterov,
        multiplier=o.multiplier,
        frozen=o.frozen,
        layer_decay=o.layer_decay,
        layer_decay_min=o.layer_decay_min,
        layer_decay_overrides=o.layer_decay_overrides,
        steps=config.train.steps,
        warmup_steps=o.warmup_steps,
        clip_norm=o.clip_norm,
        classes=module_classes(make_sam2(m.variant, m.resolution, m.version)),
    )


def check_batches(config: Any, mesh: Mesh, processes: int) -> None:
    """Can the batches of every source be dealt out? UserError that names the key if not."""
    for key, source in sources_by_key(config).items():
        size = source.batch_size
        sharding.check_batch_size(
            size, mesh, processes, config.train.accumulate, f"{key}.batch_size"
        )


def make_config_model(config: Any, mesh: Mesh) -> Sam2:
    """The model that a config describes for the devices of a mesh; it holds no parameters.

    Raises:
        UserError: the implementation of attention is none for these devices.
    """
    m = config.model
    kernel = make_kernel(m.attention, mesh.devices.flat[0])
    dropouts = m.attention_dropout, m.dropout, m.drop_path
    model = make_sam2(m.variant, m.resolution, m.version, *dropouts, kernel)
    describe_attention(config, model)
    return model


def describe_attention(config: Any, model: Sam2) -> str:
    """What its largest attentions are in a training step; raises as `make_config_model`.

    Those of the trunk that see the whole image, and of memory attention, where dropout is, the
    self-attention and that to the most memories which the longest clips have.
    """
    v, dropout = model.variant, config.model.attention_dropout > 0
    stage = bisect.bisect(np.cumsum(v.stages), v.global_blocks[0])
    image, top = ((model.resolution // (4 * 2**n)) ** 2 for n in (stage, 2))
    frames = max(source.num_frames for source in sources_by_key(config).values())
    keys, masked = min(frames - 1, NUM_MEMORIES) * top, memory.outgrown(frames)
    parts = {"trunk": (Size(image, image, v.embed_dim // v.num_heads), False)}
    if frames > 1:
        parts["memory, itself"] = Size(top, top, v.hidden_dim), dropout
        parts["memory, earlier frames"] = Size(top, keys, v.hidden_dim, masked), dropout
    names = {
        part: described(model.kernel, size, config.train.precision, drops)
        for part, (size, drops) in parts.items()
    }
    if names.get("memory, earlier frames") == "xla":
        names["memory, earlier frames"] = "blockwise"  # of any size: see model/growing.py
    return "; ".join(f"{part}: {name}" for part, name in names.items())


def make_config_state(config: Any, model: Sam2) -> tuple[optim.Optimizer, State, Params]:
    """(optimizer, shapes of the state before the first step, of the model's own parameters)."""
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    optimizer, with_adapters = make_config_optimizer(config, shapes)
    begin = functools.partial(init_state, optimizer=optimizer, ema=config.train.ema_decay > 0)
    return optimizer, jax.eval_shape(begin, with_adapters), shapes


def make_config_optimizer(config: Any, shapes: Params) -> tuple[optim.Optimizer, Params]:
    """(optimizer, shapes of all parameters) of a config, given those of its model.

    Adapters of `lora.rules` come in beside their kernels; of the model's own parameters only those
    of `lora.also_train` are then trained. Raises `UserError` for rules that miss.
    """
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, config.lora.rules))
    settings = make_optim_settings(config)
    held = lora.frozen_paths(shapes, config.lora.rules, config.lora.also_train)
    settings = settings._replace(frozen=(*settings.frozen, *held))
    shapes = partition.join(shapes, adapters)
    optimizer = optim.make_optimizer(settings, shapes, config.model.version)
    for path in filter(lora.is_lora, rules.paths_of(shapes)):
        if optimizer.labels[path] == optim.FROZEN:
            raise UserError(
                f"optim.frozen={config.optim.frozen!r} freezes the adapter '{path}': leave out "
                "what does, since lora.rules freezes the model's own parameters"
            )
    return optimizer, shapes


def make_config_step(config: Any, model: Any, optimizer: optim.Optimizer, mesh: Mesh) -> TrainStep:
    """The step that a config describes, not yet jitted."""
    settings = prompts.PromptSettings(**config.prompts)
    points = settings.prob_points > 0

    def sample_plan(key: RandomKey, num_frames: int) -> PromptPlan:
        corrections = settings.corrections if points or num_frames == 1 else 0
        return prompts.sample_plan(key, num_frames, settings._replace(corrections=corrections))

    weights = losses.LossWeights(**config.loss)
    # Corrected frames, too, become conditioning frames
    max_cond = max(settings.max_cond_frames, settings.max_corrected_frames)
    return make_train_step(
        optimizer,
        loss_fn=make_loss(
            model,
            weights,
            config.train.remat,
            max_cond,
            points,
            config.train.segment,
            config.train.truncate,
            Shared("model", shared) if (shared := mesh.shape["model"]) > 1 else None,
        ),
        sample_plan=sample_plan,
        mesh=mesh,
        precision=config.train.precision,
        reduce_precision=config.train.reduce_precision,
        lora_rules=config.lora.rules,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
        skip=config.train.not_finite == "skip",
    )
