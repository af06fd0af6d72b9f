"""The optimizer: which parameter gets which options, and an update that skips what is untouched.

Follows facebookresearch/sam2@2b90b9f training/optimizer.py. Every option has rules of its own over
the parameters' paths (see rules.py), independent of the other options'; parameters with the same
values of all options form a group.
"""

import fnmatch
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from sam2_jax import groups, methods, schedules, updates
from sam2_jax.rules import Tree, match_rules, match_some, path_of, paths_of
from sam2_jax.types import Array, PromptPlan, UserError

FROZEN = "frozen"
BUFFERS = ("*/gaussian",)  # frozen in any case: the prompt encoder's random frequencies
TRUNK = "image_encoder/trunk/"


class OptimSettings(NamedTuple):
    """Everything `make_optimizer` needs; of options and their rules see methods.py."""

    learning_rate: Any
    weight_decay: Any
    frozen: Sequence[str]  # selectors; these and BUFFERS get neither updates nor moments
    layer_decay: float  # of the trunk's learning rates from block to block; 1: none
    layer_decay_min: float  # no rate falls below this share
    layer_decay_overrides: Sequence[tuple[Sequence[str], float]]  # selectors in the trunk, share
    steps: int
    warmup_steps: int  # over which learning rates rise linearly, whatever their schedules
    clip_norm: float
    name: str = "adamw"  # one of methods.METHODS
    b1: Any = None  # None here and below: as the method has it
    b2: Any = None
    eps: Any = None
    momentum: Any = None
    decay_rate: Any = None
    nesterov: bool = False
    multiplier: Sequence[tuple[Sequence[str], float]] = ()  # selectors, factor of learning rates
    classes: Mapping[str, str] | None = None  # see rules.py; for `class:` selectors


class Optimizer(NamedTuple):
    """An optax transformation; its `update` takes `active`, a dict from `active_groups`."""

    tx: optax.GradientTransformationExtraArgs
    schedules: dict[str, schedules.Schedule]  # by the name that metrics use
    labels: dict[str, str]  # slash path -> group
    about: dict[str, str]  # group -> what it gets, in words
    options: dict[str, updates.Options]  # group -> option -> value
    scales: dict[str, float]  # slash path -> factor of its learning rate


def layer_scales(
    paths: Sequence[str],
    decay: float,
    least: float,
    overrides: Sequence[tuple[Sequence[str], float]],
    classes: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Share of the learning rate that each path gets: less, the nearer a trunk block is to images.

    Of n blocks, block i has decay ** (n - i), what comes before the first has decay ** (n + 1),
    none less than `least`; all outside the trunk 1. `overrides` are (selectors, share), of which
    the first match wins. Raises `UserError` for a selector that takes nothing of the trunk.

    Source: facebookresearch/sam2@2b90b9f training/optimizer.py `layer_decay_param_modifier`,
    hieradet.py `get_layer_id`.
    """
    key = "optim.layer_decay_overrides"
    trunk = [path for path in paths if path.startswith(TRUNK)]
    rules = [selectors for selectors, _ in overrides]
    try:
        taken = match_some(rules, trunk, key, classes)
    except UserError as e:
        match_some(rules, paths, key, classes)  # says so where it is nowhere in the model
        raise UserError(f"{e}: layer decay is for the trunk only, under '{TRUNK}'") from e
    blocks = [re.match(rf"{TRUNK}blocks_(\d+)/", path) for path in trunk]
    count = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    scales = dict.fromkeys(paths, 1.0)
    for path, block, rule in zip(trunk, blocks, taken, strict=True):
        depth = int(block[1]) + 1 if block else 0
        share = max(decay ** (count + 1 - depth), least)
        scales[path] = share if rule is None else overrides[rule][1]
    return scales


def activity_rules(version: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(group, globs) of parameters that some plans leave without a gradient; see `active_groups`.

    `version` is the model's, '2.0' or '2.1', which has parameters that 2.0 lacks.
    """
    memory = (
        "memory_attention/*",
        "memory_encoder/*",
        "maskmem_tpos_enc",
        "obj_ptr_proj/*",
        "no_obj_ptr",
    )
    if version != "2.0":
        memory += ("obj_ptr_tpos_proj/*", "no_obj_embed_spatial")
    return (
        ("memory", memory),
        ("mask", ("mask_downsample/*",)),
        ("points", ("no_mem_embed",)),
        ("never", ("no_mem_pos_enc",)),
        ("rest", ("*",)),
    )


def active_groups(plan: PromptPlan) -> dict[str, Bool[Array, ""]]:
    """Which groups of `activity_rules` a plan gives gradients to.

    Memory is read only by frames that are not initial conditioning frames; the mask prompt acts
    only through that memory; the no-memory embedding is skipped where the prompt is a mask (the
    mask is the output); `no_mem_pos_enc` is never read.
    """
    tracks = jnp.any(~jnp.asarray(plan.is_cond))
    points = jnp.asarray(plan.use_points)
    return {
        "memory": tracks,
        "mask": tracks & ~points,
        "points": points,
        "never": jnp.zeros((), bool),
        "rest": tracks | points,
    }


def make_optimizer(settings: OptimSettings, shapes: Tree, version: str) -> Optimizer:
    """The optimizer of a parameter tree, of which only paths are read; also of parts of the tree.

    For every option each parameter must match a rule, and every selector must be used: `UserError`
    otherwise. The clip is over all groups; frozen parameters count neither in its norm nor have
    they moments. `version` is the model's.
    """
    s = settings
    paths = paths_of(shapes)
    given = {option: getattr(s, option) for option in methods.OPTIONS}
    rules = methods.check_method(s.name, given, s.nesterov)
    methods.check_factors("optim.multiplier", s.multiplier)
    chosen = {
        option: match_rules([r.selectors for r in of], paths, f"optim.{option}", s.classes)
        for option, of in rules.items()
    }
    factors = match_some([r[0] for r in s.multiplier], paths, "optim.multiplier", s.classes)
    buffers = [glob for glob in BUFFERS if any(fnmatch.fnmatchcase(path, glob) for path in paths)]
    frozen = match_some([(*buffers, *s.frozen)], paths, "optim.frozen", s.classes)

    scales = layer_scales(
        paths, s.layer_decay, s.layer_decay_min, s.layer_decay_overrides, s.classes
    )
    activity = activity_rules(version)
    kinds = match_rules([globs for _, globs in activity], paths, "optim.activity_rules")
    labels: dict[str, str] = {}
    options: dict[str, updates.Options] = {}
    about = {FROZEN: "frozen"}
    for i, path in enumerate(paths):
        which = factors[i]
        factor = None if which is None else s.multiplier[which][1]
        if factor is not None:
            scales[path] *= factor
        if frozen[i] is not None:
            labels[path] = FROZEN
            continue
        numbers = {option: indices[i] for option, indices in chosen.items()}
        mine = {option: rules[option][number] for option, number in numbers.items()}
        labels[path] = label = groups.label_of(numbers, rules, which)
        if label not in options:
            options[label] = {
                option: groups.value_of(option, rule, s.steps, s.warmup_steps)
                for option, rule in mine.items()
            }
            about[label] = groups.words_of(mine, rules, factor)

    if not options:
        raise UserError(f"optim.frozen={s.frozen!r} leaves nothing to train: take fewer globs")
    method = methods.METHODS[s.name]
    activity_of = {path: activity[kind][0] for path, kind in zip(paths, kinds, strict=True)}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        label: updates.update_leaves(
            lambda values: method.direction(values, s.nesterov), of, scales, activity_of
        )
        for label, of in options.items()
    }

    def label_tree(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(lambda keys, _: labels[path_of(keys)], tree)

    def frozen_tree(tree: Tree) -> Tree:
        return jax.tree.map(lambda label: label == FROZEN, label_tree(tree))

    # The clip is outside `partition`, hence over all groups; frozen gradients count in no norm
    tx = optax.chain(
        optax.masked(optax.set_to_zero(), frozen_tree),
        updates.clip_by_global_norm(s.clip_norm),
        optax.partition({FROZEN: optax.set_to_zero(), **transforms}, label_tree),
    )
    return Optimizer(
        tx, groups.logged_schedules(rules, s.steps, s.warmup_steps), labels, about, options, scales
    )


def values_of_path(optimizer: Optimizer, path: str, step: int) -> dict[str, float]:
    """Every option of a parameter after `step` updates, its learning rate with all factors.

    Empty for a frozen one.
    """
    label = optimizer.labels[path]
    if label == FROZEN:
        return {}
    values = {k: float(v) for k, v in updates.values_at(optimizer.options[label], step).items()}
    return values | {"learning_rate": values["learning_rate"] * optimizer.scales[path]}


def group_sizes(optimizer: Optimizer, shapes: Tree) -> dict[str, tuple[int, int]]:
    """(tensors, elements) of each group, for the table at start-up."""
    sizes: dict[str, tuple[int, int]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        label = optimizer.labels[path_of(keys)]
        tensors, elements = sizes.get(label, (0, 0))
        sizes[label] = (tensors + 1, elements + int(np.prod(leaf.shape)))
    return sizes
