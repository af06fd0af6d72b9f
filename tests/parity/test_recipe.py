"""configs/mose.py:base_plus against the reference's own recipe, number for number.

Every value of the reference's file, interpolations resolved, is in one of two tables of
recipe_table.py: SAME, with what it is here, or OTHERWISE, with why nothing of ours is to equal it.
"""
# pyright: reportMissingImports=false

import ast
import fnmatch
import inspect
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import sam2
import torch
import training
from omegaconf import OmegaConf
from torch.utils.data import DistributedSampler
from training.dataset.vos_raw_dataset import PNGRawDataset
from training.dataset.vos_sampler import RandomUniformSampler
from training.optimizer import construct_optimizer, layer_decay_param_modifier
from training.utils.train_utils import register_omegaconf_resolvers

from configs import mose
from sam2_jax import convert, methods, optim, rules
from sam2_jax import recipe as recipe_lib
from sam2_jax.data import augment
from sam2_jax.data.colour import GREY
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.model.variants import VARIANTS
from tests.parity import reference, tolerances
from tests.parity.recipe_table import (
    BARE,
    CHANGES,
    CONFIG,
    DATA,
    DECAYED,
    IMAGE,
    KEPT,
    OPTIM,
    ORDER,
    OTHERWISE,
    REST,
    SAME,
)

RECIPE = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"
INTERPOLATED = ("scratch", "dataset", "vos")  # sections that `trainer` refers to
NANO = ("nano", 64, "2.1")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of dicts and lists by dotted path."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items)
    return {key: value for part in parts for key, value in part.items()}


def load() -> Any:
    """The reference's file."""
    if not OmegaConf.has_resolver("divide"):
        register_omegaconf_resolvers()
    return OmegaConf.load(pathlib.Path(sam2.__path__[0]) / RECIPE)


def length(recipe: dict[str, Any], path: str) -> int:
    """Entries of a list in the file."""
    return len({p.removeprefix(f"{path}.").split(".")[0] for p in recipe if p.startswith(path)})


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """Every value of the reference's file by dotted path, interpolations resolved."""
    tree: Any = OmegaConf.to_container(load(), resolve=True)
    return flatten({key: value for key, value in tree.items() if key not in INTERPOLATED})


@pytest.mark.parametrize("path", SAME)
def test_value_is_the_recipes(path, recipe):
    expected = recipe[path]
    if isinstance(expected, float):
        expected = pytest.approx(expected, rel=tolerances.COMPUTED)
    assert SAME[path] == expected


def test_every_value_of_the_recipe_is_accounted_for(recipe):
    rest = [path for path in recipe if path not in SAME]
    taken = {glob: [path for path in rest if fnmatch.fnmatchcase(path, glob)] for glob in OTHERWISE}
    assert not set(rest) - {path for paths in taken.values() for path in paths}
    assert not [glob for glob, paths in taken.items() if not paths]


def test_rules_are_no_more_than_the_recipes(recipe):
    """What SAME reads by its number is all there is, and ours for the rest is for all the rest."""
    assert (len(IMAGE), REST, DECAYED) == (1, ["*"], ["*"])
    assert (len(BARE), len(KEPT), len(CONFIG["optim.layer_decay_overrides"])) == (2, 1, 1)
    assert length(recipe, f"{OPTIM}.options.lr") == len(CONFIG["optim.learning_rate"])
    assert length(recipe, f"{OPTIM}.options.weight_decay") == len(CONFIG["optim.weight_decay"])
    assert length(recipe, f"{OPTIM}.param_group_modifiers") == 1
    assert not CONFIG["optim.frozen"]
    assert not CONFIG["optim.multiplier"]
    assert not CONFIG["lora.rules"]
    assert CONFIG["optim.warmup_steps"] == 0
    assert CONFIG["train.accumulate"] == 1
    assert CONFIG["train.ema_decay"] == 0


def test_steps_are_as_many_as_the_reference_makes(recipe):
    """An epoch of its DistributedSampler, which makes every device's share equally long."""
    shown = range(int(CONFIG["data.multiplier"] * mose.CLIPS))
    share = len(DistributedSampler(shown, num_replicas=mose.DEVICES, rank=0))  # pyright: ignore
    per_epoch = share // recipe[f"{DATA}.batch_sizes.0"]  # drop_last
    assert CONFIG["train.steps"] == recipe["trainer.max_epochs"] * per_epoch


def test_what_the_file_leaves_to_its_classes():
    """Defaults of arguments that the recipe does not give."""

    def default(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    adam = methods.METHODS["adamw"].defaults
    assert (adam["b1"], adam["b2"]) == default(torch.optim.AdamW, "betas")
    assert adam["eps"] == default(torch.optim.AdamW, "eps")
    assert {CONFIG[f"optim.{name}"] for name in ("b1", "b2", "eps")} == {None}
    assert default(layer_decay_param_modifier, "layer_decay_min") is None
    assert CONFIG["optim.layer_decay_min"] == 0
    assert CONFIG["data.reverse"] == default(RandomUniformSampler, "reverse_time_prob")
    assert CONFIG["data.folder.sample_rate"] == default(PNGRawDataset, "sample_rate")
    assert CONFIG["data.folder.single_object"] == default(PNGRawDataset, "single_object_mode")
    # training.dataset.transforms needs torchvision to be imported, not to be read
    source = pathlib.Path(training.__path__[0]) / "dataset" / "transforms.py"
    classes = {x.name: x for x in ast.parse(source.read_text()).body if isinstance(x, ast.ClassDef)}
    assert CONFIG["data.augment.hflip"] == written_default(classes["RandomHorizontalFlip"], "p")
    fill = written_default(classes["RandomAffine"], "image_mean")
    assert CONFIG["data.augment.fill"] == fill
    assert written_default(classes["RandomAffine"], "scale") is None
    assert CONFIG["data.augment.scale"] == (1, 1)
    nothing = ("vflip", "mosaic", "noise", "blur")
    assert {CONFIG[f"data.augment.{name}"] for name in nothing} == {0}
    assert (CONFIG["data.min_stride"], CONFIG["data.max_stride"]) == (1, 1)
    assert CONFIG["data.later_objects"] == 0
    assert CONFIG["data.folder.annotated_every"] == 1


def written_default(definition: ast.ClassDef, name: str) -> Any:
    """The default of an argument of a class, as its source has it."""
    init = next(x for x in definition.body if getattr(x, "name", "") == "__init__")
    assert isinstance(init, ast.FunctionDef)
    names = [argument.arg for argument in init.args.args]
    defaults = dict(zip(names[::-1], init.args.defaults[::-1], strict=False))
    return ast.literal_eval(defaults[name])


@pytest.mark.parametrize("where", [0.0, 0.25, 0.75])
def test_every_parameter_gets_the_rates_of_the_reference(where):
    """Learning rate and weight decay, by its own optimizer, at a share of the training."""
    shapes = jax.eval_shape(lambda: init_params(make_sam2(*NANO), jax.random.key(0)))
    config = mose.get_config("base_plus")
    config.model.variant = NANO[0]  # groups and depth go by names: small models do
    ours = optim.make_optimizer(recipe_lib.make_optim_settings(config), shapes, NANO[2])
    theirs = reference.build(VARIANTS[NANO[0]], NANO[1], NANO[2], seed=0)
    o = load().trainer.optim
    optimizer = construct_optimizer(theirs, o.optimizer, o.options, o.param_group_modifiers)
    optimizer.step_schedulers(where, 0)
    groups = optimizer.optimizer.param_groups
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    step = round(where * config.train.steps)

    def tree_of(option: str) -> dict[str, np.ndarray]:
        def value(keys: Any, leaf: Any) -> np.ndarray:
            found = optim.values_of_path(ours, rules.path_of(keys), step).get(option, np.nan)
            return np.broadcast_to(found, leaf.shape)

        return convert.to_reference(jax.tree_util.tree_map_with_path(value, shapes))

    rates, decays = tree_of("learning_rate"), tree_of("weight_decay")
    for name, parameter in theirs.named_parameters():
        got = rates[name].flat[0], decays[name].flat[0]
        assert got == pytest.approx(of[id(parameter)], rel=tolerances.SCHEDULE), name


def test_transforms_come_in_the_recipes_order(recipe, monkeypatch):
    found = []
    for i in range(length(recipe, CHANGES)):
        name = recipe[f"{CHANGES}.{i}._target_"].rpartition(".")[2]
        found.append((name, recipe.get(f"{CHANGES}.{i}.consistent_transform")))
    assert found == [(name, shared) for name, shared, _ in ORDER]

    calls: list[str] = []
    settings = augment.AugmentSettings(grayscale=1.0)

    def note(name: str) -> None:
        original = getattr(augment, name)

        def noted(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(augment, name, noted)

    def adjust(frame: Any, ops: list[Any]) -> None:
        del frame
        colours.append(ops)

    colours: list[list[Any]] = []
    for name in ("_flip", "_turn", "resize_clip"):
        note(name)
    monkeypatch.setattr(augment, "adjust", adjust)
    frames = np.zeros((2, 16, 24, 3), np.uint8)
    masks = np.ones((2, 1, 16, 24), bool)
    augment.augment(np.random.default_rng(0), frames, masks, 32, settings)
    assert [*calls, "jitter", "grey", "frame_jitter"] == [ours for *_, ours in ORDER if ours]
    first, second = colours  # of each frame: the clip's jitter, grey, a jitter of its own
    assert first[3] == second[3] == GREY
    assert first[:3] == second[:3]
    assert len(first) == len(second) == 7
    assert first[4:] != second[4:]
