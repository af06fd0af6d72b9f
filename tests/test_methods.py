"""Optimizers by name: against optax and torch, inactive parameters, options that do not fit."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam2_jax import methods, optim, schedules, updates
from sam2_jax.types import UserError

STEPS = 12
SHAPES = {"a": (160, 130), "b": (3, 4), "maybe": (2, 3)}  # the first is factored by Adafactor
# Another order of the same float32 operations, over a dozen steps
RELATIVE = 5e-7


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def train(name: str, options: dict, on: Sequence[bool] = (True,) * STEPS, nesterov: bool = False):
    """(parameters, state) before the first step and after each; 'maybe' is active where `on`."""
    method = methods.METHODS[name]
    given = dict.fromkeys(methods.OPTIONS) | {"learning_rate": 1e-2, "weight_decay": 0.0} | options
    rules = methods.check_method(name, given, nesterov)
    values = {option: rule[0].schedule for option, rule in rules.items()}
    made = {
        k: schedules.make(v, STEPS) if k in options and not schedules.is_number(v) else v
        for k, v in values.items()
    }
    tx = updates.update_leaves(
        lambda v: method.direction(v, nesterov),
        made,
        dict.fromkeys(SHAPES, 1.0),
        {k: "maybe" if k == "maybe" else "rest" for k in SHAPES},
    )

    @jax.jit
    def step(params, state, grads, active):
        change, state = tx.update(grads, state, params, active={"rest": True, "maybe": active})
        return optax.apply_updates(params, change), state

    params: Any = draw(0)
    history: list[tuple[Any, Any]] = [(params, tx.init(params))]
    for i, active in enumerate(on):
        params, state = step(*history[-1], draw(1 + i), active)
        history.append((params, state))
    return history


def reference(tx: optax.GradientTransformation) -> Any:
    params: Any = draw(0)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        change, state = tx.update(grads, state, params)
        return optax.apply_updates(params, change), state

    for i in range(STEPS):
        params, state = step(params, state, draw(1 + i))
    return params


RATE = schedules.make(("cosine", 1e-2, 1e-3), STEPS)
COSINE = {"learning_rate": ("cosine", 1e-2, 1e-3)}
OPTAX = {
    "adamw": ("adamw", COSINE | {"weight_decay": 0.1}, optax.adamw(RATE, weight_decay=0.1)),
    "lion": ("lion", COSINE | {"weight_decay": 0.1}, optax.lion(RATE, weight_decay=0.1)),
    "lion's betas": ("lion", {"b1": 0.8, "b2": 0.9}, optax.lion(1e-2, 0.8, 0.9, weight_decay=0.0)),
    "sgd": ("sgd", COSINE, optax.sgd(RATE)),
    "momentum": ("sgd", COSINE | {"momentum": 0.9}, optax.sgd(RATE, 0.9)),
    "adafactor": ("adafactor", COSINE, optax.adafactor(RATE)),
    "adafactor's options": (
        "adafactor",
        {"momentum": 0.9, "decay_rate": 0.7, "eps": 1e-8},
        optax.adafactor(1e-2, momentum=0.9, decay_rate=0.7, eps=1e-8),
    ),
}


@pytest.mark.parametrize("case", OPTAX)
def test_always_active_parameters_go_as_in_optax(case):
    name, options, tx = OPTAX[case]
    got, want = train(name, options)[-1][0], reference(tx)
    for path, value in got.items():
        np.testing.assert_allclose(value, want[path], rtol=RELATIVE, atol=RELATIVE, err_msg=path)


def test_nesterov_goes_as_in_optax():
    got = train("sgd", {"momentum": 0.9}, nesterov=True)[-1][0]
    want = reference(optax.sgd(1e-2, 0.9, nesterov=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RELATIVE, atol=1e-6), got, want)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_torch(nesterov):
    """Also where a parameter has no gradient on some steps, and while the rate falls."""
    torch = pytest.importorskip("torch")
    on = [i % 3 != 1 for i in range(STEPS)]
    tensors = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in draw(0).items()}
    theirs = torch.optim.SGD(tensors.values(), lr=0.0, momentum=0.9, nesterov=nesterov)
    for i, active in enumerate(on):
        for k, grad in draw(1 + i).items():
            missing = k == "maybe" and not active
            tensors[k].grad = None if missing else torch.tensor(np.asarray(grad))
        theirs.param_groups[0]["lr"] = float(RATE(i))
        theirs.step()
    got = train("sgd", COSINE | {"momentum": 0.9}, on, nesterov)[-1][0]
    for k, tensor in tensors.items():
        np.testing.assert_allclose(got[k], tensor.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=k)


def test_scheduled_betas_equal_torch():
    torch = pytest.importorskip("torch")
    tensors = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in draw(0).items()}
    theirs = torch.optim.AdamW(tensors.values(), lr=1e-2, weight_decay=0.0)
    for i in range(STEPS):
        for k, grad in draw(1 + i).items():
            tensors[k].grad = torch.tensor(np.asarray(grad))
        where = i / STEPS
        theirs.param_groups[0].update(
            betas=(0.5 + 0.4 * where, 0.9 + 0.09 * where), weight_decay=0.3 * where
        )
        theirs.step()
    options = {
        "b1": ("linear", 0.5, 0.9),
        "b2": ("linear", 0.9, 0.99),
        "weight_decay": ("linear", 0.0, 0.3),
    }
    got = train("adamw", options)[-1][0]
    for k, tensor in tensors.items():
        np.testing.assert_allclose(got[k], tensor.detach().numpy(), rtol=2e-5, atol=2e-5, err_msg=k)


def test_weight_decay_is_decoupled_for_all():
    for name in methods.METHODS:
        (begun, _), (plain, _), *_ = train(name, {}, on=(True,))
        _, (decayed, _), *_ = train(name, {"weight_decay": 0.5}, on=(True,))
        for path, start in begun.items():
            np.testing.assert_allclose(
                decayed[path] - plain[path], -1e-2 * 0.5 * start, rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("name", methods.METHODS)
def test_inactive_parameters_keep_value_moments_and_count(name):
    options = {"momentum": 0.9} if "momentum" in methods.METHODS[name].defaults else {}
    on = (True, False, False, True)
    history = train(name, options | {"weight_decay": 0.1}, on)
    for i, active in enumerate(on):
        (before, state), (after, later) = history[i : i + 2]
        assert later.step == i + 1
        for path in SHAPES:
            kept = np.array_equal(before[path], after[path])
            assert kept == (path == "maybe" and not active), (i, path)
        for kind in ("rest", "maybe"):
            same = jax.tree.map(np.array_equal, state.kinds[kind], later.kinds[kind])
            assert jax.tree.all(same) == (kind == "maybe" and not active), (i, kind)
    # What skipped two steps goes on as if they had not been
    direct = train(name, options | {"weight_decay": 0.1}, (True,))
    np.testing.assert_array_equal(direct[-1][0]["maybe"], history[3][0]["maybe"])


def check(**changes):
    given = dict.fromkeys(methods.OPTIONS) | {"learning_rate": 1e-3, "weight_decay": 0.1}
    name, nesterov = changes.pop("name", "adamw"), changes.pop("nesterov", False)
    return methods.check_method(name, given | changes, nesterov)


def test_defaults_are_those_of_optax():
    for name, expected in {
        "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "lion": {"b1": 0.9, "b2": 0.99},
        "sgd": {},
        "adafactor": {"decay_rate": 0.8, "eps": 1e-30},
    }.items():
        rules = check(name=name)
        got = {option: rule[0].schedule for option, rule in rules.items()}
        assert got == expected | {"learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adam"}, "optim.name='adam' is unknown: did you mean 'adamw'? (of adamw, ada"),
        ({"name": "sgd", "b1": 0.9}, "optim.b1=0.9 is no option of optim.name='sgd', which has"),
        ({"momentum": 0.9}, "optim.momentum=0.9 is no option of optim.name='adamw'"),
        ({"nesterov": True}, "optim.nesterov=True needs optim.name='sgd' with an optim.momentum"),
        ({"name": "sgd", "nesterov": True}, "optim.nesterov=True needs"),
        ({"learning_rate": None}, "optim.learning_rate=None must be"),
        ({"learning_rate": ("cosine", 1e-3, -1e-3)}, "must be at least 0"),
        ({"b2": 1.0}, "optim.b2: values of 1.0 must be at least 0 and less than 1"),
        ({"b2": float("nan")}, "optim.b2: "),
        ({"weight_decay": (0.1,)}, "optim.weight_decay: rule 0.1 must be (globs, value)"),
        ({"weight_decay": (("*", 0.1),)}, "optim.weight_decay: "),
        ({"weight_decay": ((("*",), 0.1, 0.2),)}, "must be (globs, value)"),
        ({"weight_decay": "0,1"}, "optim.weight_decay='0,1' must be a number, a schedule"),
        ({"weight_decay": ((("*",), "0,1"),)}, "'0,1' is no schedule"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(UserError) as error:
        check(**changes)
    assert words in str(error.value), error.value


def test_factors_are_checked():
    methods.check_factors("optim.multiplier", ((("*",), 2),))
    with pytest.raises(UserError, match=re.escape("optim.multiplier: -1 of rule")):
        methods.check_factors("optim.multiplier", ((("*",), -1),))
    with pytest.raises(UserError, match=re.escape("optim.multiplier: rule ('*', 1)")):
        methods.check_factors("optim.multiplier", (("*", 1),))


def test_settings_pass_through():
    settings = optim.OptimSettings(
        learning_rate=1e-2,
        weight_decay=0.0,
        frozen=(),
        layer_decay=1.0,
        layer_decay_min=0.0,
        layer_decay_overrides=(),
        steps=3,
        warmup_steps=0,
        clip_norm=1.0,
        name="lion",
    )
    with pytest.raises(UserError, match="optim.momentum"):
        optim.make_optimizer(settings._replace(momentum=0.1), draw(0), "2.1")
