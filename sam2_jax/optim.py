"""AdamW with groups by ordered globs, which leaves alone what a step did not touch.

Follows facebookresearch/sam2@2b90b9f training/optimizer.py and torch.optim.AdamW. Parameters are
addressed by slash paths (`image_encoder/trunk/blocks_0/attn/qkv/kernel`) and sorted into groups
by rules: ordered globs in fnmatch's sense (`*` crosses `/`), of which the first match wins.
"""

import difflib
import fnmatch
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from sam2_jax.types import Array, PromptPlan, UserError

Tree = Any  # a nested dict of arrays, or what mirrors one
FROZEN = "frozen"
BUFFERS = ("*/gaussian",)  # frozen in any case: the prompt encoder's random frequencies
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class OptimSettings(NamedTuple):
    """Everything `make_optimizer` needs. Rules are (globs, ...) in order, first match wins."""

    learning_rate: tuple[tuple[Sequence[str], float, float], ...]  # globs, start, end
    weight_decay: tuple[tuple[Sequence[str], float], ...]  # globs, value
    frozen: Sequence[str]  # globs; these and BUFFERS get neither updates nor moments
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


def path_of(keys: Sequence[Any]) -> str:
    """Slash path of a leaf from the key path that jax.tree_util gives."""

    def name(key: Any) -> str:  # of a dict, a NamedTuple, a sequence
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return "/".join(map(name, keys))


def paths_of(tree: Tree) -> list[str]:
    """Slash paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def match_rules(rules: Sequence[Sequence[str]], paths: Sequence[str], key: str) -> list[int]:
    """Index of the first rule (a sequence of globs) that matches each path.

    Raises `UserError`, which names `key`, if a path matches no rule or a glob takes no path.
    """
    used: set[tuple[int, str]] = set()
    result = []
    for path in paths:
        for index, globs in enumerate(rules):
            hits = [glob for glob in globs if fnmatch.fnmatchcase(path, glob)]
            if hits:
                used.update((index, glob) for glob in hits)
                result.append(index)
                break
        else:
            raise UserError(
                f"{key}: no rule matches parameter '{path}'; end the rules with one for '*'"
            )
    for index, globs in enumerate(rules):
        for glob in globs:
            if (index, glob) not in used:
                near = difflib.get_close_matches(glob, paths, n=1, cutoff=0.0)
                raise UserError(
                    f"{key}: '{glob}' matches no parameter that earlier rules leave"
                    + (f" (nearest parameter: '{near[0]}')" if near else "")
                )
    return result


def cosine(start: float, end: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """end + (start - end) / 2 * (1 + cos(pi * step / steps)), times a linear warm-up if asked.

    As in the reference the first update uses `start` itself (written so that rounding keeps it)
    and the last stops short of `end`.
    """

    def schedule(step):
        where = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
        value = start - 0.5 * (start - end) * (1 - jnp.cos(jnp.pi * where))
        return value * jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)

    return schedule


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
                    cosine(start, end, settings.steps, settings.warmup_steps)
                ),
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
    schedules = {
        name: cosine(start, end, settings.steps, settings.warmup_steps)
        for name, (_, start, end) in zip(names, settings.learning_rate, strict=True)
    }
    return Optimizer(tx, schedules, labels, about)


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
