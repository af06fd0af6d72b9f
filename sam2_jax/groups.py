"""Groups of parameters with the same options: their values, their names in tables and metrics."""

from collections.abc import Mapping, Sequence

from sam2_jax import schedules
from sam2_jax.methods import Rule

# Named in any case; other options only where they have several rules
LABELS = {"learning_rate": "lr", "weight_decay": "wd"}
WORDS = {"learning_rate": "rate", "weight_decay": "decay"}


def value_of(option: str, rule: Rule, steps: int, warmup_steps: int) -> float | schedules.Schedule:
    """What an option is set to by a rule; learning rates alone are warmed up."""
    if option == "learning_rate":
        return schedules.make(rule.schedule, steps, warmup_steps)
    constant = schedules.constant(rule.schedule)
    return schedules.make(rule.schedule, steps) if constant is None else constant


def label_of(
    numbers: Mapping[str, int], rules: Mapping[str, Sequence[Rule]], factor: int | None
) -> str:
    """A group's name: which rule of each option it has, of options with one rule none is said."""
    parts = [
        f"{LABELS.get(option, option)}{number}"
        for option, number in numbers.items()
        if option in LABELS or len(rules[option]) > 1
    ]
    return "_".join(parts + ([f"x{factor}"] if factor is not None else []))


def words_of(
    mine: Mapping[str, Rule], rules: Mapping[str, Sequence[Rule]], factor: float | None
) -> str:
    """What a group gets, in words, for tables."""
    words = [
        f"{WORDS.get(option, option)} {schedules.describe(rule.schedule)}"
        for option, rule in mine.items()
        if option in WORDS or len(rules[option]) > 1
    ]
    if factor is not None:
        words[0] += f" x {factor:g}"
    return f"{' '.join(mine['learning_rate'].selectors)}: {', '.join(words)}"


def logged_schedules(
    rules: Mapping[str, Sequence[Rule]], steps: int, warmup_steps: int
) -> dict[str, schedules.Schedule]:
    """By name in the metrics: every learning rate, and of other options what changes."""
    logged = {}
    for option, of in rules.items():
        names = rule_names(option, [rule.selectors for rule in of])
        for name, rule in zip(names, of, strict=True):
            value = value_of(option, rule, steps, warmup_steps)
            if callable(value):
                logged[name] = value
    return logged


def rule_names(option: str, rules: Sequence[Sequence[str]]) -> list[str]:
    """What metrics call an option of each rule: 'learning_rate', or with its first selector.

    A name that an earlier rule has gets the rule's number, from 1.
    """
    names: list[str] = []
    for number, selectors in enumerate(rules, 1):
        name = "/".join(word for word in (option, selectors[0].strip("*/")) if word)
        names.append(f"{name}_{number}" if name in names else name)
    return names
