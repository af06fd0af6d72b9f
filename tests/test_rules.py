"""Selectors: by path, by the class of the module; the first match wins, nothing is unused."""

import re

import pytest

from sam2_jax import rules
from sam2_jax.types import UserError

CLASSES = {"": "Model", "norm": "LayerNorm", "out": "Dense", "empty": "Block"}
PATHS = ["norm/scale", "norm/bias", "out/bias", "token"]


def test_first_match_wins():
    assert rules.match_rules([["*bias"], ["class:LayerNorm"], ["*"]], PATHS, "k", CLASSES) == [
        1,
        0,
        0,
        2,
    ]
    assert rules.match_rules([["class:LayerNorm", "token"], ["*"]], PATHS, "k", CLASSES) == [
        0,
        0,
        1,
        0,
    ]


def test_the_class_is_exact():
    classes = {"a": "LayerNorm2d", "b": "LayerNorm"}
    paths = ["a/bias", "b/bias", "b/c/bias"]
    assert rules.match_some([["class:LayerNorm"]], paths, "k", classes) == [None, 0, None]


def test_some_may_be_left():
    assert rules.match_some([["out/*"]], PATHS, "k") == [None, None, 0, None]
    assert rules.match_some([], PATHS, "k") == [None] * 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([["norm/*"], ["out/*"]], "no rule matches parameter 'token'; end the rules with one"),
        ([["*"], ["token"]], "'token' matches no parameter that earlier rules leave"),
        ([["nrm/*"], ["*"]], "'nrm/*' matches no parameter (nearest parameter: 'norm/"),
        (
            [["class:Dens"], ["*"]],
            "class 'Dens' holds parameters: those that do are Dense, LayerNorm, Model",
        ),
        ([["norm/*"], ["class:LayerNorm"], ["*"]], "'class:LayerNorm' matches no parameter that"),
    ],
)
def test_what_is_missed_is_named(given, words):
    with pytest.raises(UserError, match="^optim.x: .*" + re.escape(words)):
        rules.match_rules(given, PATHS, "optim.x", CLASSES)
