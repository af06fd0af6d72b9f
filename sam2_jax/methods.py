"""The optimizers by name: which options each has, and the direction in which it steps.

An option is a schedule (schedules.py) for all parameters, or rules `((selectors, schedule), ...)`
(rules.py). Learning rate and weight decay are options of all methods and are applied in optim.py;
the directions are optax's own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from sam2_jax import schedules
from sam2_jax.rules import nearest
from sam2_jax.types import Array, UserError

Values = Mapping[str, float | Array]  # of the options, at one step


class Rule(NamedTuple):
    """The parameters that `selectors` take get `schedule`."""

    selectors: Sequence[str]
    schedule: Any


class Method(NamedTuple):
    """An optimizer."""

    defaults: dict[str, float | None]  # options of its own; None: without, unless it is given
    direction: Callable[[Values, bool], optax.GradientTransformation]  # values, nesterov


def _adafactor(values: Values, nesterov: bool) -> optax.GradientTransformation:
    """optax.adafactor before learning rate and decay: momentum is of steps not yet scaled by it."""
    del nesterov
    steps = [
        optax.scale_by_factored_rms(decay_rate=values["decay_rate"], epsilon=values["eps"]),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    ]
    if "momentum" in values:
        steps.append(optax.ema(values["momentum"], debias=False))  # pyright: ignore
    return optax.chain(*steps)


def _sgd(values: Values, nesterov: bool) -> optax.GradientTransformation:
    return optax.trace(values["momentum"], nesterov) if "momentum" in values else optax.identity()


METHODS = {
    "adamw": Method(
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
        lambda v, _: optax.scale_by_adam(v["b1"], v["b2"], v["eps"]),
    ),
    "adafactor": Method({"decay_rate": 0.8, "eps": 1e-30, "momentum": None}, _adafactor),
    "lion": Method({"b1": 0.9, "b2": 0.99}, lambda v, _: optax.scale_by_lion(v["b1"], v["b2"])),
    "sgd": Method({"momentum": None}, _sgd),
}
# Within these an update of finite gradients is finite in float32: a step is judged by gradients
TINY, HUGE = 1e-37, 1e6
LIMITS = {  # least value, and what values must stay below
    "learning_rate": (0.0, HUGE),
    "weight_decay": (0.0, HUGE),
    "b1": (0.0, 1.0),
    "b2": (0.0, 1.0),
    "eps": (TINY, math.inf),
    "momentum": (0.0, 1.0),
    "decay_rate": (0.0, math.inf),
}
OPTIONS = tuple(LIMITS)


def is_rule(rule: Any) -> bool:
    """Whether it is a pair of which the first are selectors."""
    pair = schedules.is_list(rule) and len(rule) == 2 and schedules.is_list(rule[0])
    return pair and bool(rule[0]) and all(isinstance(x, str) for x in rule[0])


def check_rules(key: str, rules: Any, hint: str = "") -> None:
    """Raises `UserError` unless it is ((selectors, what they get), ...); `hint` ends it."""
    if not schedules.is_list(rules):
        raise UserError(f"{key}={rules!r} must be ((globs, value), ...), globs a tuple of strings")
    for rule in rules:
        if not is_rule(rule):
            raise UserError(
                f"{key}: rule {rule!r} must be (globs, value), globs a tuple of strings{hint}"
            )


def check_factors(key: str, rules: Any) -> None:
    """Raises `UserError` unless it is ((selectors, number from 0 to `HUGE`), ...)."""
    check_rules(key, rules)
    for rule in rules:
        if not schedules.is_number(rule[1]) or not 0 <= rule[1] < HUGE:
            raise UserError(
                f"{key}: {rule[1]!r} of rule {rule!r} must be a number of at least 0 and less than "
                f"{HUGE:g}"
            )


def rules_of(option: str, setting: Any) -> tuple[Rule, ...]:
    """The rules of an option; raises `UserError` where they or their schedules are not right."""
    key = f"optim.{option}"
    if schedules.is_schedule(setting):
        setting = ((("*",), setting),)
    elif not schedules.is_list(setting):
        raise UserError(
            f"{key}={setting!r} must be a number, a schedule such as ('cosine', 5e-6, 5e-7), or "
            "rules ((globs, number or schedule), ...)"
        )
    check_rules(key, setting, " (and a phase of a schedule (curve, numbers ..., share))")
    least, below = LIMITS[option]
    for _, schedule in setting:
        schedules.check(key, schedule)
        values = schedules.values_of(schedule)
        if not (min(values) >= least and max(values) < below):
            limit = f" and less than {below:g}" if below < math.inf else ""
            raise UserError(f"{key}: values of {schedule!r} must be at least {least:g}{limit}")
    return tuple(Rule(*rule) for rule in setting)


def check_method(
    name: str, settings: Mapping[str, Any], nesterov: bool
) -> dict[str, tuple[Rule, ...]]:
    """The rules of every option that the method `name` uses, by option.

    `settings` are by option, None where the method's default counts. Raises `UserError` for an
    unknown method, an option that it does not have, and rules that are not right.
    """
    if name not in METHODS:
        raise UserError(
            f"optim.name='{name}' is unknown: did you mean '{nearest(name, list(METHODS))}'? "
            f"(of {', '.join(METHODS)})"
        )
    defaults = METHODS[name].defaults
    own = ("learning_rate", "weight_decay", *defaults)
    for option in OPTIONS:
        if option not in own and settings[option] is not None:
            raise UserError(
                f"optim.{option}={settings[option]!r} is no option of optim.name='{name}', which "
                f"has {', '.join(own)}: leave it at None"
            )
    given = {o: defaults.get(o) if settings[o] is None else settings[o] for o in own}
    if nesterov and (name != "sgd" or given["momentum"] is None):
        raise UserError(
            f"optim.nesterov={nesterov} needs optim.name='sgd' with an optim.momentum, found "
            f"'{name}': set those or leave it at False"
        )
    for option in ("learning_rate", "weight_decay"):
        if given[option] is None:
            raise UserError(f"optim.{option}=None must be a schedule, or rules that give one")
    return {o: rules_of(o, value) for o, value in given.items() if value is not None}
