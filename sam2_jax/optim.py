"""AdamW with groups by ordered globs, which leaves alone what a step did not touch.

Follows facebookresearch/sam2@2b90b9f training/optimizer.py and torch.optim.AdamW. Parameters are
sorted into groups by ordered globs over their slash paths (see rules.py).
"""

import fnmatch
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from sam2_jax import schedules
from sam2_jax.rules import Tree, match_rules, path_of, paths_of
from sam2_jax.types import Array, PromptPlan

FROZEN = "frozen"
BUFFERS = ("*/gaussian",)  # frozen in any case: the prompt encoder's random frequencies
TRUNK = "image_encoder/trunk/"
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class OptimSettings(NamedTuple):
    """Everything `make_optimizer` needs. Rules are (globs, ...) in order, first match wins."""

    learning_rate: tuple[tuple[Sequence[str], float, float], ...]  # globs, start, end
    weight_decay: tuple[tuple[Sequence[str], float], ...]  # globs, value
    frozen: Sequence[str]  # globs; these and BUFFERS get neither updates nor moments
    layer_decay: float  # of the trunk's learning rates from block to block; 1: none
    layer_decay_min: float  # no rate falls below this share
    layer_decay_overrides: tuple[tuple[Sequence[str], float], ...]  # trunk globs, share
    steps: int
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    clip_norm: float


class Optimizer(NamedTuple):
    """An optax transformation; its `update` takes `active`, a dict from `active_groups`."""

    tx: optax.GradientTransformationExtraArgs
    schedules: dict[str, optax.Schedule]  # by the name that metrics use
    labels: dict[str, str]  # slash path -> group
    about: dict[str, str]  # group -> what it gets, in words


class ScaleByAdamState(NamedTuple):
    """Adam's moments, with one count per leaf, since leaves skip steps."""

    count: Tree
    mu: Tree
    nu: Tree


def layer_scales(
    paths: Sequence[str],
    decay: float,
    least: float,
    overrides: Sequence[tuple[Sequence[str], float]],
) -> dict[str, float]:
    """Share of the learning rate that each path gets: less, the nearer a trunk block is to images.

    Of n blocks, block i has decay ** (n - i), what comes before the first has decay ** (n + 1),
    none less than `least`; all outside the trunk 1. `overrides` are (globs over trunk paths,
    share), of which the first match wins. Raises `UserError` for a glob that takes no path.

    Source: facebookresearch/sam2@2b90b9f training/optimizer.py `layer_decay_param_modifier`,
    hieradet.py `get_layer_id`.
    """
    trunk = [path for path in paths if path.startswith(TRUNK)]
    rules = [globs for globs, _ in overrides]
    rest = len(rules)
    taken = match_rules([*rules, ("*",)], trunk, "optim.layer_decay_overrides") if rules else ()
    blocks = [re.match(rf"{TRUNK}blocks_(\d+)/", path) for path in trunk]
    count = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    scales = dict.fromkeys(paths, 1.0)
    for path, block, rule in zip(trunk, blocks, taken or [rest] * len(trunk), strict=True):
        depth = int(block[1]) + 1 if block else 0
        share = max(decay ** (count + 1 - depth), least)
        scales[path] = share if rule == rest else overrides[rule][1]
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


def scale_by_adam(
    b1: float, b2: float, eps: float, is_active: Callable[[str, Mapping[str, Array]], Array]
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction; leaves that are not active keep moments and count and get no update."""

    def init(params: Tree) -> ScaleByAdamState:
        return ScaleByAdamState(
            count=jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates, state, params=None, **extra):
        del params
        active = extra["active"]

        def leaf(keys, grad, count, mu, nu):
            on = is_active(path_of(keys), active)
            count = count + on.astype(jnp.int32)
            mu = jnp.where(on, b1 * mu + (1 - b1) * grad, mu)
            nu = jnp.where(on, b2 * nu + (1 - b2) * grad**2, nu)
            # A leaf never touched has count 0: its correction would divide by zero.
            steps = jnp.maximum(count, 1).astype(jnp.float32)
            mean = mu / (1 - b1**steps)
            scale = jnp.sqrt(nu / (1 - b2**steps)) + eps
            return jnp.where(on, mean / scale, 0.0), count, mu, nu

        out = jax.tree_util.tree_map_with_path(leaf, updates, state.count, state.mu, state.nu)
        first, count, mu, nu = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0, 0, 0, 0)), out
        )
        return first, ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_path(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies each leaf's update by the number of its path, weight decay included."""

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(
            lambda keys, u: u * scales[path_of(keys)], updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def zero_inactive(
    is_active: Callable[[str, Mapping[str, Array]], Array],
) -> optax.GradientTransformationExtraArgs:
    """Sets the update of inactive leaves to zero, so that nothing before it moves them."""

    def update(updates, state, params=None, **extra):
        del params
        active = extra["active"]
        return jax.tree_util.tree_map_with_path(
            lambda keys, u: jnp.where(is_active(path_of(keys), active), u, jnp.zeros_like(u)),
            updates,
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales by max_norm / (norm + 1e-6), at most 1: torch's formula, which optax's is not."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + CLIP_EPSILON), 1.0)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(settings: OptimSettings, shapes: Tree, version: str) -> Optimizer:
    """The optimizer of a parameter tree, of which only paths are read.

    Every parameter must match a rule for learning rate and for weight decay, and every glob must
    be used: `UserError` otherwise. The clip is outside `optax.partition`, hence over all groups;
    frozen parameters count neither in its norm nor have they moments.
    """
    paths = paths_of(shapes)
    rates = match_rules([r[0] for r in settings.learning_rate], paths, "optim.learning_rate")
    decays = match_rules([r[0] for r in settings.weight_decay], paths, "optim.weight_decay")
    buffers = [glob for glob in BUFFERS if any(fnmatch.fnmatchcase(path, glob) for path in paths)]
    freeze = [(*buffers, *settings.frozen), ("*",)]
    is_frozen = [i == 0 for i in match_rules(freeze, paths, "optim.frozen")]

    scales = layer_scales(
        paths, settings.layer_decay, settings.layer_decay_min, settings.layer_decay_overrides
    )
    rules = activity_rules(version)
    groups = match_rules([globs for _, globs in rules], paths, "optim.activity_rules")
    group_of = {path: rules[i][0] for path, i in zip(paths, groups, strict=True)}

    def is_active(path: str, active: Mapping[str, Array]) -> Array:
        return jnp.asarray(active[group_of[path]])

    labels: dict[str, str] = {}
    transforms: dict[Hashable, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    about = {FROZEN: "frozen"}
    for path, rate, decay, frozen in zip(paths, rates, decays, is_frozen, strict=True):
        label = FROZEN if frozen else f"lr{rate}_wd{decay}"
        labels[path] = label
        if label not in transforms:
            globs, start, end = settings.learning_rate[rate]
            value = settings.weight_decay[decay][1]
            about[label] = f"{' '.join(globs)}: rate {start:g} to {end:g}, decay {value:g}"
            transforms[label] = optax.chain(
                scale_by_adam(settings.b1, settings.b2, settings.eps, is_active),
                optax.add_decayed_weights(value),
                optax.scale_by_learning_rate(
                    schedules.cosine(start, end, settings.steps, settings.warmup_steps)
                ),
                scale_by_path(scales),
                zero_inactive(is_active),
            )

    def label_tree(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(lambda keys, _: labels[path_of(keys)], tree)

    def frozen_tree(tree: Tree) -> Tree:
        return jax.tree.map(lambda label: label == FROZEN, label_tree(tree))

    tx = optax.chain(
        optax.masked(optax.set_to_zero(), frozen_tree),
        clip_by_global_norm(settings.clip_norm),
        optax.partition(transforms, label_tree),
    )
    names = rate_names([globs for globs, _, _ in settings.learning_rate])
    rates_by_name = {
        name: schedules.cosine(start, end, settings.steps, settings.warmup_steps)
        for name, (_, start, end) in zip(names, settings.learning_rate, strict=True)
    }
    return Optimizer(tx, rates_by_name, labels, about)


def rate_names(rules: Sequence[Sequence[str]]) -> list[str]:
    """What metrics call the learning rate of each rule: 'learning_rate', or with its first glob.

    A name that an earlier rule has gets the rule's number, from 1.
    """
    names: list[str] = []
    for number, globs in enumerate(rules, 1):
        words = ["learning_rate", globs[0].strip("*/")]
        name = "/".join(word for word in words if word)
        names.append(f"{name}_{number}" if name in names else name)
    return names


def group_sizes(optimizer: Optimizer, shapes: Tree) -> dict[str, tuple[int, int]]:
    """(tensors, elements) of each group, for the table at start-up."""
    sizes: dict[str, tuple[int, int]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        label = optimizer.labels[path_of(keys)]
        tensors, elements = sizes.get(label, (0, 0))
        sizes[label] = (tensors + 1, elements + int(np.prod(leaf.shape)))
    return sizes
