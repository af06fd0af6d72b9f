"""What is checked before a run, and what processes of one run must agree on."""

import errno
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import mixture, smoke
from sam2_jax import cluster, losses, preparing
from sam2_jax import config as config_lib
from sam2_jax.data.augment import AugmentSettings
from sam2_jax.data.pipeline import Part, make_loader
from sam2_jax.data.sampling import Sampling
from sam2_jax.types import FrameOut, UserError
from sam2_jax.validation import EvalSet
from tests.data.arrays import Arrays, some_clips


@pytest.mark.parametrize(
    ("process", "old", "new"),
    [
        (1, "clips of train=6", "clips of train=5"),
        (2, "last checkpoint=30", "last checkpoint=20"),
        (1, "evaluation clips far=6", "evaluation clips far=3"),
    ],
)
def test_processes_that_find_something_else_stop(monkeypatch, process, old, new):
    part = Part("train", Arrays(some_clips()), Sampling(1, 1), AugmentSettings(), 1)
    loader = make_loader([part], side=16)
    make_run: Any = preparing.Run  # of what is looked at alone
    run = make_run(*[None] * 6, sets("far"), 30)
    preparing.same_everywhere(run, loader)  # a single process agrees with itself
    monkeypatch.setattr(cluster, "gather_text", lambda text: [text] * 3)
    preparing.same_everywhere(run, loader)

    def differ(text):
        assert old in text
        return [text.replace(old, new) if i == process else text for i in range(3)]

    monkeypatch.setattr(cluster, "gather_text", differ)
    with pytest.raises(UserError, match=f"process {process} has {new}.* process 0 has {old}"):
        preparing.same_everywhere(run, loader)


def sets(*names):
    return [EvalSet(name, Arrays(some_clips())) for name in names]


def settings(**changes):
    config = smoke.get_config()
    config.eval.sets.far = "x"
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "names", "words"),
    [
        ({"checkpoint.best": "eval/J&f"}, [""], "one of eval/J&F, eval/J, eval/F$"),
        ({"checkpoint.best": "eval/far/J"}, ["near"], "one of eval/near/J, eval/near/J&F, "),
        ({"checkpoint.best": "eval/J&F "}, [], "give --config.data.eval_root$"),
        ({"checkpoint.best": "eval/J&f", "checkpoint.keep_best": 0}, [""], "one of eval/J&F,"),
        ({"eval.prompts": ("box",)}, [""], "eval/box/J&F, .* or checkpoint.keep_best=0"),
        ({}, ["far"], "eval/far/J&F, .* or checkpoint.keep_best=0"),
        (
            {"checkpoint.best": "eval/loss", "eval.loss_clips": 2},
            ["far"],
            "one of eval/far/loss, .*eval/far/loss_class",
        ),
    ],
)
def test_a_best_that_no_evaluation_finds(changes, names, words):
    with pytest.raises(UserError, match=f"checkpoint.best=eval/.* finds: .*{words}"):
        preparing.check_best(settings(**changes), sets(*names))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["", "far"]),
        ({}, []),  # nothing is evaluated, and nothing was asked for
        ({"checkpoint.keep_best": 0}, ["far"]),
        ({"checkpoint.best": "eval/far/click3/F", "eval.prompts": ("mask", "click3")}, ["far"]),
        ({"checkpoint.best": "eval/far/loss_dice", "eval.loss_clips": 2}, ["", "far"]),
    ],
)
def test_a_best_that_there_is(changes, names):
    preparing.check_best(settings(**changes), sets(*names))


def test_what_is_evaluated_is_what_is_written(monkeypatch, tmp_path):
    """The names are those of rows, of the evaluation and of its losses."""
    config = settings(**{"eval.prompts": ("mask", "box"), "eval.loss_clips": 1})
    static = types.SimpleNamespace(jf=0.1, j=0.1)
    found = types.SimpleNamespace(jf=0.2, j=0.2, f=0.2, static=static)
    monkeypatch.setattr(preparing.validation, "_evaluate", lambda *args: found)
    monkeypatch.setattr(preparing.validation, "_draw", lambda *args: None)
    monkeypatch.setattr(preparing.validation, "_copies", lambda params: [])
    monkeypatch.setattr(preparing.validation, "_tracker", lambda *args: None)
    chosen = sets("", "far")
    row = preparing.validation.validate(config, None, chosen, tmp_path, None, 1)
    names = preparing.evaluated(config, chosen)
    assert {name for name in row if "static" not in name} == {n for n in names if "loss" not in n}
    zero = jnp.zeros(())
    monkeypatch.setattr(losses, "frame_terms", lambda *args: losses.Terms(zero, zero, zero, zero))
    out = FrameOut(*[jnp.zeros(1)] * len(FrameOut._fields))
    _, terms = losses.total(out, jnp.zeros((1, 1, 1, 2, 2), bool), jnp.ones((1, 1), bool))
    assert {"loss", *terms} == set(preparing.LOSSES)


def test_the_best_is_checked_before_a_run(tmp_path):
    config = smoke.get_config()
    config.data.batch_size = jax.device_count()
    config.checkpoint.best = "eval/J&f"
    with pytest.raises(UserError, match="checkpoint.best=eval/J&f"):
        preparing.prepare(config_lib.finish(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_sizes_of_a_mixture_bear_its_names(tmp_path):
    config = mixture.get_config("nano")
    config.data.batch_size = config.data.mixture.sav.batch_size = jax.device_count()
    config.data.mixture.sa1b.batch_size = jax.device_count() + 1
    with pytest.raises(UserError, match="^data.mixture.sa1b.batch_size="):
        preparing.prepare(config_lib.finish(config), tmp_path)


@pytest.mark.parametrize("closed", ["runs", "runs/mine"])
def test_a_workdir_that_may_not_be_searched(monkeypatch, tmp_path, closed):
    """The superuser may search everything: what others get is put in its place."""
    stat = pathlib.Path.stat

    def refuse(self, **kwargs):
        if tmp_path / closed in self.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **kwargs)

    monkeypatch.setattr(pathlib.Path, "stat", refuse)
    workdir = tmp_path / "runs" / "mine"
    with pytest.raises(UserError, match=f"--workdir={workdir} cannot be looked .*Permission"):
        preparing.prepare(config_lib.finish(smoke.get_config()), workdir)


def test_a_file_in_the_place_of_checkpoints(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is a file, not a folder"):
        preparing.prepare(config_lib.finish(smoke.get_config()), tmp_path)


def test_a_value_of_two_lines_agrees_with_itself(monkeypatch):
    monkeypatch.setattr(cluster, "gather_text", lambda text: [text] * 2)
    cluster.agree({"data.root": "two\nlines"}, "never seen")
