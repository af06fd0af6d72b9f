"""Going on with changed settings: what is refused, what is shown, a config.json that is torn."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest

from configs import mixture, smoke
from sam2_jax import checkpoint, resume
from sam2_jax.config_keys import flat_keys
from sam2_jax.types import UserError


def start(workdir, config) -> None:
    resume.write_config(workdir, json.dumps(config.to_dict()))


def test_changed_keys(tmp_path):
    before = {"train": {"steps": 5, "old": 1}, "optim": {"frozen": ["a"]}}
    (tmp_path / "config.json").write_text(json.dumps(before))
    flat = {"train.steps": 6, "optim.frozen": ("a",), "eval.new": 0}
    assert resume.changed_keys(tmp_path, flat) == {
        "train.steps": "5 -> 6",
        "eval.new": "not set -> 0",
        "train.old": "1 -> not set",
    }
    assert resume.changed_keys(tmp_path / "none", flat) == {}
    assert resume.differences({"a": {"b": [1]}}, {"a.b": (2,)}) == {"a.b": "[1] -> [2]"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.variant", "tiny", r"model\.variant: 'nano' -> 'tiny'\): it is a run of another m"),
        ("model.version", "2.0", r"model\.version: '2\.1' -> '2\.0'"),
        ("model.resolution", 96, r"model\.resolution: 128 -> 96"),
        ("optim.name", "lion", r"optim\.name: 'adamw' -> 'lion'\): .*state of that optimizer"),
        ("lora.rules", ((("*",), 2, 4.0),), r"lora\.rules: \[\] -> \[\[\['\*'\], 2, 4\.0\]\]"),
        ("lora.also_train", ("*",), r"lora\.also_train: \[\] -> \['\*'\]"),
        ("seed", 3, r"seed: 0 -> 3\): its position in the training data"),
        ("data.batch_size", 8, r"data\.batch_size: 2 -> 8"),
        ("data.draw", "random", r"data\.draw: 'interleave' -> 'random'"),
    ],
)
def test_what_may_not_change(tmp_path, key, value, words):
    config = smoke.get_config()
    start(tmp_path, config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=words):
        resume.check(tmp_path, flat_keys(config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 9),
        ("train.ema_decay", 0.9),
        ("train.log_every", 1),
        ("model.dropout", 0.3),
        ("optim.frozen", ("image_encoder/*",)),  # told by the arrays, if they differ
        ("optim.learning_rate", 1e-5),
        ("data.root", "moved"),
        ("data.source", "packed"),
        ("data.augment.hflip", 0.1),
        ("mesh.fsdp", 2),
    ],
)
def test_what_may_change_is_shown(tmp_path, key, value):
    config = smoke.get_config()
    start(tmp_path, config)
    config.update_from_flattened_dict({key: value})
    resume.check(tmp_path, flat_keys(config))
    assert list(resume.changed_keys(tmp_path, flat_keys(config))) == [key]


def test_shares_of_a_mixture_may_not_change(tmp_path):
    config = mixture.get_config()
    start(tmp_path, config)
    config.data.batch_size += 1  # which a mixture does not read
    resume.check(tmp_path, flat_keys(config))
    config.data.mixture.sav.weight += 1.0
    with pytest.raises(UserError, match=r"data\.mixture\.sav\.weight: .*position"):
        resume.check(tmp_path, flat_keys(config))


def test_a_key_that_is_new_is_no_change(tmp_path):
    config = smoke.get_config()
    before = config.to_dict()
    del before["optim"]["name"]
    resume.write_config(tmp_path, json.dumps(before))
    resume.check(tmp_path, flat_keys(config))


def test_settings_of_the_optimizer_are_named():
    changed = {"train.steps": "1 -> 2", "optim.frozen": "[] -> ['*']"}
    assert resume.optimizer_changes(changed) == "optim.frozen: [] -> ['*']"
    assert resume.optimizer_changes({}) == "optim.*"


def test_config_is_replaced_whole(tmp_path, monkeypatch):
    workdir = tmp_path / "runs/new"
    resume.write_config(workdir, '{"seed": 1}')
    assert [p.name for p in workdir.iterdir()] == ["config.json"]

    def killed(*paths):
        raise InterruptedError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(InterruptedError):
        resume.write_config(workdir, '{"seed": 2}')
    assert resume.read_config(workdir) == {"seed": 1}


@pytest.mark.parametrize("text", ["", '{"model": {"vari', "[]"])
def test_a_torn_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (resume.check, resume.changed_keys):
        with pytest.raises(UserError, match=r"config\.json .*delete it"):
            read(tmp_path, {})


def test_what_counts_is_the_checkpoint_gone_on_from(tmp_path):
    """The start after it may have had other settings, and have saved nothing."""
    config = smoke.get_config()
    with checkpoint.make_manager(tmp_path, checkpoint.Keep(2)) as manager:
        one = {"w": jnp.zeros(2)}
        checkpoint.save(manager, 2, one, one, {})
        checkpoint.save(manager, 4, one, one, {}, settings=config.to_dict())
    config.train.steps += 1
    config.seed += 1
    start(tmp_path, config)
    changed = resume.changed_keys(tmp_path, flat_keys(config))
    assert changed == {"train.steps": "500 -> 501", "seed": "0 -> 1"}
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        resume.check(tmp_path, flat_keys(config))
    (tmp_path / "config.json").write_text("{torn")
    assert resume.changed_keys(tmp_path, flat_keys(config)) == changed
    start(tmp_path, config)
    damage = tmp_path / "checkpoints/4/config/metadata"
    damage.write_text(damage.read_text().replace("nano", "tiny"))
    with pytest.raises(UserError, match="4/config cannot be restored .not what was saved"):
        resume.check(tmp_path, flat_keys(config))
    shutil.rmtree(tmp_path / "checkpoints/4")  # what is left does not say
    assert resume.changed_keys(tmp_path, flat_keys(config)) == {}
