"""Schedules against their formulas and, where it is installed, fvcore."""

import re

import numpy as np
import pytest

from sam2_jax import schedules
from sam2_jax.types import UserError

STEPS = 1000
# float32 against float64; of the largest value, since curves end in differences
RELATIVE = 1e-6
WARM = (("linear", 0.0, 5e-6, 0.05), ("constant", 5e-6, 0.25), ("cosine", 5e-6, 5e-7, 0.7))
DECAYS = (("polynomial", 2.0, 0.0, 0.9, 0.35), ("step", (3.0, 1.0, 7.0), (0.2, 0.9), 0.65))
ALL = {
    "number": 0.1,
    "constant": ("constant", 0.1),
    "linear": ("linear", 1e-4, 3e-6),
    "cosine": ("cosine", 5e-6, 5e-7),
    "cosine up": ("cosine", 0.0, 2.0),
    "polynomial": ("polynomial", 2.0, 0.0, 0.9),
    "step": ("step", (1.0, 0.1, 0.01), (0.3, 0.85)),
    "phases": WARM,
    "more phases": DECAYS,
}


def theirs(schedule):
    """The same in fvcore."""
    fvcore = pytest.importorskip("fvcore.common.param_scheduler")
    if isinstance(schedule, float):
        return fvcore.ConstantParamScheduler(schedule)
    if isinstance(schedule[0], tuple):
        parts = [theirs(phase[:-1]) for phase in schedule]
        lengths = [phase[-1] for phase in schedule]
        return fvcore.CompositeParamScheduler(parts, lengths, ["rescaled"] * len(parts))
    match schedule:
        case ("constant", value):
            return fvcore.ConstantParamScheduler(value)
        case ("linear", start, end):
            return fvcore.LinearParamScheduler(start, end)
        case ("cosine", start, end):
            return fvcore.CosineParamScheduler(start, end)
        case ("polynomial", start, 0.0, power):
            return fvcore.PolynomialDecayParamScheduler(start, power)
        case ("step", values, milestones):
            updates = [round(STEPS * m) for m in milestones]
            return fvcore.MultiStepParamScheduler(list(values), STEPS, updates)


@pytest.mark.parametrize("name", ALL)
def test_as_fvcore(name):
    expected = theirs(ALL[name])
    assert expected is not None
    steps = np.arange(STEPS)
    got = np.asarray(schedules.make(ALL[name], STEPS)(steps))
    want = np.array([expected(step / STEPS) for step in steps])
    np.testing.assert_allclose(got, want, rtol=0, atol=RELATIVE * np.abs(want).max())


@pytest.mark.parametrize("name", ALL)
def test_starts_exactly_and_stays_between_its_values(name):
    values = schedules.values_of(ALL[name])
    schedule = schedules.make(ALL[name], STEPS)
    assert schedule(0) == np.float32(values[0])
    curve = np.asarray(schedule(np.arange(STEPS)))
    slack = RELATIVE * max(values)
    assert curve.min() >= min(values) - slack and curve.max() <= max(values) + slack
    # Lists, as JSON has them, are the same
    listed = (
        [list(p) if isinstance(p, tuple) else p for p in ALL[name]] if name != "number" else 0.1
    )
    np.testing.assert_array_equal(schedules.make(listed, STEPS)(np.arange(STEPS)), curve)


def test_the_last_stops_short_of_the_end():
    schedule = schedules.make(("cosine", 5e-6, 5e-7), 10)
    last = 5e-7 + 0.5 * 4.5e-6 * (1 + np.cos(np.pi * 0.9))
    np.testing.assert_allclose(np.asarray(schedule(9)), last, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(schedule(10)), 5e-7, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(schedule(99)), 5e-7, rtol=1e-6)  # a longer run


def test_inverse_square_root():
    schedule = schedules.make(("inverse_sqrt", 0.3, 0.1), STEPS)
    where = np.arange(STEPS) / STEPS
    np.testing.assert_allclose(
        np.asarray(schedule(np.arange(STEPS))), 0.3 * np.sqrt(0.1 / (0.1 + where)), rtol=1e-6
    )
    assert schedule(0) == np.float32(0.3)


def test_warmup():
    warm = schedules.make(1.0, 10, warmup_steps=4)
    np.testing.assert_allclose(np.asarray([warm(i) for i in range(6)]), [0.2, 0.4, 0.6, 0.8, 1, 1])


def test_constants_are_known():
    assert schedules.constant(0.1) == schedules.constant(("constant", 0.1)) == 0.1
    assert schedules.constant(("linear", 2, 2)) == 2.0
    assert schedules.constant(("cosine", 2, 1)) is None
    assert schedules.constant(("inverse_sqrt", 2, 1)) is None


def test_words():
    assert schedules.describe(0.1) == "0.1"
    assert schedules.describe(("cosine", 5e-6, 5e-7)) == "5e-06 to 5e-07 (cosine)"
    assert schedules.describe(WARM) == (
        "0 to 5e-06 (linear, 5 %), 5e-06 (constant, 25 %), 5e-06 to 5e-07 (cosine, 70 %)"
    )


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("0.1", "'0.1' is no schedule: give a number"),
        (None, "None is no schedule"),
        (True, "True is no schedule"),
        ((), "() is no schedule"),
        (("cosin", 1.0, 0.1), "schedule 'cosin' is unknown: did you mean 'cosine'? (of constant"),
        (("cosine", 1.0), "('cosine', 1.0) must be of the form ('cosine', start, end)"),
        (("cosine", 1.0, "a"), "must hold numbers"),
        (("linear", 1.0, float("nan")), "must hold numbers"),
        (("inverse_sqrt", 1.0, 0.0), "timescale of ('inverse_sqrt', 1.0, 0.0) must be greater"),
        (("step", (1.0, 0.1), (0.5, 0.8)), "one number more"),
        (("step", (1.0, 0.1, 0.0), (0.8, 0.5)), "rise between 0 and 1"),
        (("step", (1.0, 0.1), (1000,)), "rise between 0 and 1"),
        ((("linear", 0.0, 1.0, 0.1), ("constant", 1.0, 0.8)), "sum to 0.9, not 1"),
        ((("linear", 0.0, 1.0), ("constant", 1.0, 0.8)), "('linear', start, end, share)"),
        ((("linear", 0.0, 1.0, 0.0), ("constant", 1.0, 1.0)), "share 0.0 of phase"),
    ],
)
def test_what_is_no_schedule_is_named(schedule, words):
    with pytest.raises(UserError, match="^optim.b1: .*" + re.escape(words)):
        schedules.check("optim.b1", schedule)
