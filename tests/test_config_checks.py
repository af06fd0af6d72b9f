"""Settings that cannot work are named, with what would; what can be meant is taken."""

import pytest

from configs import default, mixture, synthetic
from sam2_jax import config as config_lib
from sam2_jax.types import UserError


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.variant", "tinny", "did you mean 'tiny'"),
        ("model.version", "2.2", "2.1"),
        ("model.resolution", 100, "multiple of 32: take 96"),
        ("model.resolution", 16, "take 32"),
        ("data.source", "foldr", "did you mean 'folder'"),
        ("train.precision", "float16", "take bfloat16"),
        ("train.reduce_precision", "half", "float32, bfloat16"),
        ("train.remat", "frames", "did you mean 'frame'"),
        ("train.steps", 0, "train.steps=0 must be at least 1"),
        ("prompts.prob_box", 1.5, "prompts.prob_box=1.5 must be between 0 and 1"),
        ("prompts.max_cond_frames", 3, "prompts.max_corrected_frames=2"),
        ("optim.weight_decay", (0.1,), "(globs, value)"),
        ("optim.clip_norm", 0.0, "greater than 0"),
        ("optim.learning_rate", ("cosine", 1e-3, -1e-3), "at least 0"),
        ("optim.name", "adamm", "did you mean 'adamw'"),
        ("optim.momentum", 0.9, "leave it at None"),
        ("optim.learning_rate", "abc", "must be a number, a schedule such as"),
        ("optim.learning_rate", (("x",),), "phase ('x',) must be a schedule and its share"),
        ("optim.learning_rate", ("step", (1e-4, float("nan")), (0.5,)), "milestones"),
        ("optim.learning_rate", 1e7, "less than 1e+06"),
        ("optim.eps", 0.0, "must be at least 1e-37"),
        ("optim.multiplier", ((("*",), float("inf")),), "less than 1e+06"),
        ("eval.prompts", (3,), "must be names such as 'mask'"),
        ("eval.prompts", ("mask", "mask"), "names one twice"),
        ("model.dropout", 1.0, "must be less than 1"),
        ("loss.mask", -20.0, "at least 0"),
        ("seed", 2**63, "must be at most 2147483647"),
        ("train.steps", 3_000_000_000, "must be at most 2147483647"),
        ("optim.multiplier", ((("*",), "2"),), "number of at least 0"),
        ("data.synthetic.speed", 0.0, "greater than 0"),
        ("data.synthetic.eval_frames", 2, "at least 3"),
        ("eval.max_frames", 2, "0 (all) or at least 3"),
        ("checkpoint.best", "eval/loss", "eval.loss_clips=0"),
        ("seed", -1, "seed=-1 must be at least 0"),
        ("data.augment.degrees", float("nan"), "must be finite"),
        ("data.augment.blur", float("inf"), "must be finite"),
        ("data.augment.scale", (1.0, float("inf")), "must be finite"),
        ("data.weight", float("nan"), "must be finite"),
        ("data.augment.fill", (300, 0, 0), "must be 0 to 255"),
        ("data.instances.max_area", 0.0, "greater than 0"),
        ("data.weight", -0.5, "at least 0"),
        ("data.weight", 0.5, "data.mixture is empty: take 0"),
        ("eval.prompts", (), "take ('mask',)"),
        ("loss.mask", float("nan"), "loss.mask=nan must be finite"),
        ("loss.object_class", float("inf"), "must be finite"),
        ("train.profile_steps", (9_999, 10_001), "not beyond train.steps=10000"),
        ("train.profile_steps", (1.5, 2), "whole numbers"),
        ("train.profile_steps", ("a", "b"), "whole numbers"),
        ("optim.frozen", (1,), "optim.frozen=(1,) must be a tuple of globs"),
        ("lora.also_train", (None,), "lora.also_train=(None,) must be a tuple of globs"),
        ("lora.rules", (((1,), 2, 4.0),), "tuple of one string or more"),
        ("lora.rules", (((), 2, 4.0),), "tuple of one string or more"),
        ("lora.rules", ((("*",), True, 4.0),), "rank a whole number"),
        ("lora.rules", ((("*",), 2, True),), "(globs, rank, alpha)"),
        ("lora.rules", ((("*",), 2, float("inf")),), "greater than 0 and finite"),
        ("lora.rules", ((("*",), 2, float("nan")),), "greater than 0 and finite"),
        ("checkpoint.keep_every", 750, "multiple of checkpoint.every_steps=500, else"),
        ("checkpoint.keep_every", 750, "take 1000"),
        ("checkpoint.keep_every", 100, "take 500"),
        ("checkpoint.best_is_lowest", True, "checkpoint.best=eval/J&F with"),
    ],
)
def test_values_that_cannot_work_are_named(key, value, words):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        config_lib.check(config)
    assert key in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint.keep_every": 1_500},
        {"checkpoint.keep_every": 2_000, "checkpoint.every_steps": 300},  # each is evaluated
        {"train.profile_steps": (10, 12)},
        {"optim.frozen": ["image_encoder/*"]},  # as JSON has it
    ],
)
def test_what_can_be_meant_is_taken(changes):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    config_lib.check(config)


@pytest.mark.parametrize("metric", ["eval/J", "eval/far/F", "eval/far/click3/J&F"])
def test_no_score_is_best_where_it_is_lowest(metric):
    config = default.get_config()
    config.checkpoint.best, config.checkpoint.best_is_lowest = metric, True
    with pytest.raises(UserError, match=f"checkpoint.best={metric} with .*set it to False"):
        config_lib.check(config)


@pytest.mark.parametrize("key", ["root", "include", "exclude"])
def test_rendered_clips_are_in_no_folder_and_on_no_list(key):
    config = synthetic.get_config("nano")
    config.data[key] = "somewhere"
    with pytest.raises(UserError, match=f"data.{key}=somewhere is of no use to"):
        config_lib.check(config)


def test_frames_of_a_single_source_do_not_matter_to_a_mixture():
    config = mixture.get_config("tiny")
    config.data.num_frames, config.train.segment = 7, 4
    config_lib.check(config)
    config.data.mixture.sav.num_frames = 7
    with pytest.raises(UserError, match="must divide data.mixture.sav.num_frames=7"):
        config_lib.check(config)
