"""Values as functions of the share of training done, written as plain data.

A schedule is a number, which stands for itself throughout, or one of

    ("constant", value)
    ("linear", start, end)
    ("cosine", start, end)
    ("polynomial", start, end, power)       end + (start - end) (1 - where) ** power
    ("inverse_sqrt", start, timescale)      start / sqrt(1 + where / timescale)
    ("step", values, milestones)            values[i] from share milestones[i - 1] on

or a sequence of these, phases, each with its share of the training as last entry:
`(("linear", 0.0, 5e-6, 0.05), ("cosine", 5e-6, 5e-7, 0.95))`. A phase runs through the whole of its
curve. `where`, the share done before an update, is step / steps: the first update has `start`
exactly, the last has where = (steps - 1) / steps.

The curves are those of fvcore.common.param_scheduler, composite ones 'rescaled'.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sam2_jax.rules import nearest
from sam2_jax.types import Array, UserError

Schedule = Callable[[Any], Array]  # of the number of updates done: an int, or traced
FORMS = {
    "constant": ("value",),
    "linear": ("start", "end"),
    "cosine": ("start", "end"),
    "polynomial": ("start", "end", "power"),
    "inverse_sqrt": ("start", "timescale"),
    "step": ("values", "milestones"),
}
# A boundary counts as reached this much early, so that rounding never delays it by a step
EPSILON = 1e-6
SUM_TOLERANCE = 1e-3  # of the shares of phases; the last phase takes what is left


def is_number(x: Any) -> bool:
    """Whether x is a plain number."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_list(x: Any) -> bool:
    """Whether x is a tuple, or the list that JSON makes of one."""
    return isinstance(x, tuple | list)


def is_schedule(x: Any) -> bool:
    """Whether x looks like a schedule (`check` says if it is one), not like rules or nonsense."""
    if is_list(x) and x:
        return isinstance(x[0], str) or all(is_list(p) and p and isinstance(p[0], str) for p in x)
    return is_number(x)


def phases_of(schedule: Any) -> list[tuple[Any, float]]:
    """(curve, share of the training) of each phase; one of share 1 for a single curve."""
    if is_number(schedule):
        return [(("constant", schedule), 1.0)]
    if isinstance(schedule[0], str):
        return [(schedule, 1.0)]
    return [(tuple(phase[:-1]), phase[-1]) for phase in schedule]


def values_of(schedule: Any) -> list[float]:
    """The values between which a schedule stays."""
    values: list[Any] = []
    for (kind, *rest), _ in phases_of(schedule):
        count = 1 if kind in ("constant", "inverse_sqrt") else 2
        values += rest[0] if kind == "step" else rest[:count]
    return [float(value) for value in values]


def check(key: str, schedule: Any) -> None:
    """Raises `UserError`, which names the config key `key`, unless `schedule` is one."""
    if not is_schedule(schedule):
        raise UserError(
            f"{key}: {schedule!r} is no schedule: give a number, a tuple such as ('cosine', 5e-6, "
            "5e-7), or phases with shares"
        )
    single = is_number(schedule) or isinstance(schedule[0], str)
    for phase in () if single else schedule:
        if len(phase) < 2:
            raise UserError(
                f"{key}: phase {phase!r} must be a schedule and its share of the training, such as "
                "('linear', 0.0, 5e-6, 0.05)"
            )
    phases = phases_of(schedule)
    for curve, share in phases:
        _check_curve(key, curve, () if single else ("share",))
        if not (is_number(share) and 0 < share <= 1):
            raise UserError(f"{key}: share {share!r} of phase {curve!r} must be a number in (0, 1]")
    total = sum(share for _, share in phases)
    if abs(total - 1) >= SUM_TOLERANCE:
        raise UserError(f"{key}: the shares of the phases in {schedule!r} sum to {total:g}, not 1")


def _check_curve(key: str, curve: Any, more: tuple[str, ...]) -> None:
    kind, *rest = curve
    if kind not in FORMS:
        raise UserError(
            f"{key}: schedule '{kind}' is unknown: did you mean '{nearest(kind, list(FORMS))}'? "
            f"(of {', '.join(FORMS)})"
        )
    names = (*FORMS[kind], *more)
    form = f"('{kind}', {', '.join(names)})"
    if len(rest) != len(FORMS[kind]):
        raise UserError(f"{key}: schedule {tuple(curve)!r} must be of the form {form}")
    if kind == "step":
        values, milestones = rest
        good = is_list(values) and is_list(milestones) and len(values) == len(milestones) + 1
        good = good and all(is_number(x) and math.isfinite(x) for x in [*values, *milestones])
        if not good or not all(a < b for a, b in itertools.pairwise((0, *milestones, 1))):
            raise UserError(
                f"{key}: in {tuple(curve)!r} of the form {form} values must be one number more "
                "than milestones, and milestones must rise between 0 and 1"
            )
    elif not all(is_number(x) and math.isfinite(x) for x in rest):
        raise UserError(f"{key}: schedule {tuple(curve)!r} must hold numbers: {form}")
    elif kind in ("polynomial", "inverse_sqrt") and rest[-1] <= 0:
        raise UserError(f"{key}: {FORMS[kind][-1]} of {tuple(curve)!r} must be greater than 0")


def make(schedule: Any, steps: int, warmup_steps: int = 0) -> Schedule:
    """A traceable function of the updates done, of `steps`; float32.

    `warmup_steps` updates at the start get 1, 2, ... of warmup_steps + 1 parts of the value.
    """
    phases = phases_of(schedule)
    ends = list(itertools.accumulate(share for _, share in phases))
    starts = [0.0, *ends[:-1]]
    lengths = [share for _, share in phases[:-1]] + [1 - starts[-1]]

    def value(step: Any) -> Array:
        where = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
        result = jnp.float32(0)
        for (curve, _), start, length in zip(phases, starts, lengths, strict=True):
            # Until its start a phase would be outside its curve, and is not chosen
            inside = jnp.clip((where - start) / length, 0.0, 1.0) if len(phases) > 1 else where
            begun = (where + EPSILON > start) | (start == 0)
            result = jnp.where(begun, _curve(curve, inside), result)
        return result * jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)

    return value


def _curve(curve: Any, where: jax.Array) -> Array:
    """Written so that rounding leaves the start as it is."""
    match tuple(curve):
        case ("constant", value):
            return jnp.float32(value)
        case ("linear", start, end):
            return start - (start - end) * where
        case ("cosine", start, end):
            return start - 0.5 * (start - end) * (1 - jnp.cos(jnp.pi * where))
        case ("polynomial", start, end, power):
            return start - (start - end) * (1 - (1 - where) ** power)
        case ("inverse_sqrt", start, timescale):
            return start / jnp.sqrt(1 + where / timescale)
        case ("step", values, milestones):
            past = sum(where + EPSILON >= jnp.float32(m) for m in milestones)
            return jnp.asarray(values, jnp.float32)[past]
    raise AssertionError(curve)


def constant(schedule: Any) -> float | None:
    """The value of a schedule that never changes, else None."""
    values = set(values_of(schedule))
    kinds = {curve[0] for curve, _ in phases_of(schedule)}
    return float(values.pop()) if len(values) == 1 and "inverse_sqrt" not in kinds else None


def describe(schedule: Any) -> str:
    """In words: `0.1`, `5e-06 to 5e-07 (cosine)`, phases with their share of the training."""
    if (value := constant(schedule)) is not None:
        return f"{value:g}"
    phases = phases_of(schedule)
    words = []
    for curve, share in phases:
        values = " to ".join(f"{value:g}" for value in values_of(curve))
        part = f", {100 * share:g} %" if len(phases) > 1 else ""
        words.append(f"{values} ({curve[0]}{part})")
    return ", ".join(words)
