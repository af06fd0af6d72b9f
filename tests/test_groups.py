"""Which parameter gets which options: groups, their names, and rules that miss."""

import numpy as np
import pytest

from sam2_jax import groups, optim
from sam2_jax.types import UserError
from tests.test_optim import SETTINGS, draw


def test_buffers_stay_frozen_beside_other_globs():
    for frozen in ((), ("image_encoder/*",), ("*/gaussian",)):
        optimizer = optim.make_optimizer(SETTINGS._replace(frozen=frozen), draw(0), "2.1")
        assert optimizer.labels["sam_prompt_encoder/gaussian"] == optim.FROZEN
        held = {path for path, label in optimizer.labels.items() if label == optim.FROZEN}
        assert ("image_encoder/trunk/qkv/bias" in held) == ("image_encoder/*" in frozen)


def test_every_group_has_its_rules():
    optimizer = optim.make_optimizer(SETTINGS, draw(0), "2.1")
    assert optimizer.labels["image_encoder/trunk/norm/scale"] == "lr0_wd0"
    assert optimizer.labels["image_encoder/neck/norm/weight"] == "lr0_wd1"  # LayerNorm2d decays
    assert optimizer.labels["mask_downsample/bias"] == "lr1_wd0"
    assert optimizer.labels["sam_prompt_encoder/gaussian"] == optim.FROZEN
    assert set(optimizer.schedules) == {"learning_rate", "learning_rate/image_encoder"}
    sizes = optim.group_sizes(optimizer, draw(0))
    assert sizes[optim.FROZEN] == (1, 8)


def test_learning_rates_have_names_of_their_own():
    rate = "learning_rate"
    names = groups.rule_names(rate, [["a/*", "b"], ["*a/*"], ["*"], ["*"]])
    assert names == [f"{rate}/a", f"{rate}/a_2", rate, f"{rate}_4"]


def test_options_have_rules_of_their_own():
    """Any option by any schedule, each with other boundaries than the others."""
    classes = {"image_encoder/trunk/norm": "LayerNorm"}
    settings = SETTINGS._replace(
        b1=((("*kernel",), ("linear", 0.8, 0.9)), (("*",), 0.9)),
        b2=0.99,
        weight_decay=((("class:LayerNorm",), 0.0), (("*",), ("linear", 0.1, 0.2))),
        multiplier=((("memory_*", "no_*"), 0.5),),
        layer_decay=0.5,
        classes=classes,
    )
    optimizer = optim.make_optimizer(settings, draw(0), "2.1")
    cosine = 0.5 * (1 + np.cos(np.pi / 2))
    encoder, rest = 3e-3 + 2.7e-2 * cosine, 5e-3 + 4.5e-2 * cosine
    expected = {  # halfway: rate, decay, b1
        "image_encoder/trunk/qkv/kernel": (encoder / 2, 0.15, 0.85),
        "image_encoder/trunk/norm/scale": (encoder / 2, 0.0, 0.9),
        "image_encoder/neck/norm/bias": (encoder, 0.15, 0.9),
        "memory_attention/kernel": (rest / 2, 0.15, 0.85),
        "no_mem_embed": (rest / 2, 0.15, 0.9),
        "mask_downsample/kernel": (rest, 0.15, 0.85),
    }
    for path, (rate, decay, b1) in expected.items():
        values = optim.values_of_path(optimizer, path, 10)
        got = [values[name] for name in ("learning_rate", "weight_decay", "b1", "b2", "eps")]
        np.testing.assert_allclose(got, [rate, decay, b1, 0.99, 1e-8], rtol=1e-6, err_msg=path)
    assert optim.values_of_path(optimizer, "sam_prompt_encoder/gaussian", 10) == {}
    assert (
        len(set(optimizer.labels.values())) == len(optimizer.about) == 8
    )  # frozen, 3 of the encoder, 4 others
    label = optimizer.labels["memory_attention/kernel"]
    assert label == "lr1_wd1_b10_x0"
    words = (
        "*: rate 0.05 to 0.005 (cosine) x 0.5, decay 0.1 to 0.2 (linear), b1 0.8 to 0.9 (linear)"
    )
    assert optimizer.about[label] == words
    rates = {"learning_rate", "learning_rate/image_encoder"}
    assert set(optimizer.schedules) == rates | {"weight_decay", "b1/kernel"}


def test_warmup_is_of_learning_rates_alone():
    settings = SETTINGS._replace(warmup_steps=4, b1=("linear", 0.5, 0.9))
    optimizer = optim.make_optimizer(settings, draw(0), "2.1")
    values = optim.values_of_path(optimizer, "no_mem_embed", 0)
    np.testing.assert_allclose(values["learning_rate"], 5e-2 / 5, rtol=1e-6)
    assert values["b1"] == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": ((("image_encoder/*",), 1.0),)}, ["learning_rate", "mask_down"]),
        ({"frozen": ("image_encodr/*",)}, ["optim.frozen", "image_encodr/*", "image_encoder"]),
        (
            {"weight_decay": ((("*",), 0.1), (("*bias*",), 0.0))},
            ["optim.weight_decay", "'*bias*'"],
        ),
        ({"b1": ((("*kernel",), 0.9),)}, ["optim.b1", "no rule matches", "'*'"]),
        ({"multiplier": ((("memori*",), 0.9),)}, ["optim.multiplier", "memori*", "memory_"]),
        ({"frozen": ("class:Dense",)}, ["optim.frozen", "'Dense'", "not known here"]),
        ({"frozen": ("*",)}, ["optim.frozen", "nothing to train"]),
    ],
)
def test_rules_that_miss_are_named(change, words):
    with pytest.raises(UserError) as error:
        optim.make_optimizer(SETTINGS._replace(**change), draw(0), "2.1")
    assert all(word in str(error.value) for word in words), error.value
