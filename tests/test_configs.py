"""Configs build, every key is read by something, and what cannot work is said in one line."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from configs import (
    cells,
    ct,
    davis,
    default,
    images,
    mixture,
    mose,
    own,
    sav,
    smoke,
    synthetic,
    ytvos,
)
from sam2_jax import config as config_lib
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
MODULES = (
    *(default, smoke, synthetic, own),
    *(davis, mose, ytvos, sav, images, cells, ct, mixture),
)
SMOKE = str(ROOT / "configs/smoke.py")


@pytest.mark.parametrize("variant", ["nano", "tiny", "small", "base_plus", "large"])
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_all_configs_have_the_same_keys_and_pass_the_checks(module, variant):
    config = module.get_config(variant)
    flat = {key for key in config_lib.flat_keys(config) if not key.startswith("data.mixture.")}
    assert flat == set(config_lib.flat_keys(default.get_config()))
    own = set(config_lib.flat_keys(default.source()))
    assert all(set(config_lib.flat_keys(x)) == own for x in config.data.mixture.values())
    config_lib.check(config)
    assert config.model.variant == variant
    json.loads(config_lib.to_json(config))


def test_every_config_file_is_tested():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert files == {module.__name__.split(".")[-1] for module in MODULES}


def test_every_key_is_read():
    """As `section.leaf`, as `name.leaf` after `name = ....section`, or by `**x.section`."""
    files = [*ROOT.glob("sam2_jax/**/*.py"), *ROOT.glob("scripts/*.py")]
    codes = [path.read_text() for path in files if path.name != "config_checks.py"]
    for key in config_lib.flat_keys(default.get_config()):
        section, leaf = ("config." + key).rsplit(".", 2)[-2:]

        def reads(code: str, section: str = section, leaf: str = leaf) -> bool:
            names = [section, *re.findall(rf"(\w+) = (?:\w+\.)+{section}\b", code)]
            patterns = [rf"\b{name}\.{leaf}\b" for name in names]
            if section == "data":  # the settings of every source, config.data and others
                patterns += [rf"\b(source|entry|part)\.{leaf}\b"]
            return any(re.search(p, code) for p in [*patterns, rf"\*\*\w+\.{section}\b"])

        assert any(map(reads, codes)), key


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
    ],
)
def test_values_that_cannot_work_are_named(key, value, words):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        config_lib.check(config)
    assert key in str(error.value)
    assert words in str(error.value)


def test_finish_prefers_a_folder_to_the_downloaded_copy():
    config = davis.get_config("nano")
    assert config_lib.finish(config).data.source == "tfds"
    config = davis.get_config("nano")
    config.data.root = "somewhere"
    assert config_lib.finish(config).data.source == "folder"


def test_finish_prefers_a_folder_in_a_mixture_too():
    config = mixture.get_config("nano")
    config.data.mixture.sav.source = config.data.mixture.sa1b.source = "tfds"
    config.data.mixture.sav.root = "somewhere"
    entries = config_lib.finish(config).data.mixture
    assert (entries.sav.source, entries.sa1b.source) == ("folder", "tfds")


@pytest.mark.parametrize("key", ["root", "include", "exclude"])
def test_rendered_clips_are_in_no_folder_and_on_no_list(key):
    config = synthetic.get_config("nano")
    config.data[key] = "somewhere"
    with pytest.raises(UserError, match=f"data.{key}=somewhere is of no use to"):
        config_lib.check(config)


def test_finished_configs_are_locked():
    config = config_lib.finish(smoke.get_config())
    with pytest.raises(AttributeError):
        config.train.stepz = 3


def test_unknown_keys_are_named_as_typed():
    config_lib.check_overrides(SMOKE, ["--config.train.steps=3", "--workdir=x"])
    with pytest.raises(UserError, match="'train.stepz': did you mean 'train.steps'"):
        config_lib.check_overrides(SMOKE, ["--config.train.stepz=3"])


def test_a_mixture_has_no_settings_of_a_single_source():
    path = str(ROOT / "configs/mixture.py")
    for key in ("num_frames", "batch_size", "augment.degrees", "sav.ann_every"):
        with pytest.raises(UserError, match=f"set --config.data.mixture.NAME.{key}, .*sa1b, sav"):
            config_lib.check_overrides(path, [f"--config.data.{key}=1"])
        config_lib.check_overrides(SMOKE, [f"--config.data.{key}=1"])
    for key in ("root", "eval_root", "workers", "folder.resolution", "mixture.sav.num_frames"):
        config_lib.check_overrides(path, [f"--config.data.{key}=1"])


def test_frames_of_a_single_source_do_not_matter_to_a_mixture():
    config = mixture.get_config("tiny")
    config.data.num_frames, config.train.segment = 7, 4
    config_lib.check(config)
    config.data.mixture.sav.num_frames = 7
    with pytest.raises(UserError, match="must divide data.mixture.sav.num_frames=7"):
        config_lib.check(config)


def test_evaluation_sets_are_named_on_the_command_line():
    """And kept in the arguments, with which a bad step is repeated."""
    code = """import sys
from sam2_jax import config
config.run(lambda c: print(c.eval.sets.to_dict(), c.train.steps, c.is_locked, *sys.argv[1:]))"""
    given = ["--config.eval.sets.far=a=b/c", f"--config={SMOKE}", "--config.eval.sets.x-1", "2016"]
    command = [sys.executable, "-c", code, *given, "--config.train.steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split("} ")[0] == "{'far': 'a=b/c', 'x-1': '2016'", done.stderr
    assert done.stdout.split("} ")[1].split() == [
        "3",
        "True",
        f"--config={SMOKE}",
        "--config.eval.sets.far=a=b/c",
        "--config.eval.sets.x-1",
        "2016",
        "--config.train.steps=3",
    ]


def test_what_is_no_evaluation_set():
    assert config_lib.split_sets(["--config.eval.sets.a=b", "-c"]) == ({"a": "b"}, ["-c"])
    with pytest.raises(UserError, match="eval.sets.far names no folder"):
        config_lib.split_sets(["--config.eval.sets.far"])
    with pytest.raises(UserError, match="'eval.set.far': did you mean 'eval.sets.NAME'"):
        config_lib.check_overrides(SMOKE, ["--config.eval.set.far=x"])
    for name, root, words in [
        ("far", "", "must be a folder"),
        ("far", 3, "must be a folder"),
        ("far/off", "x", "letters, digits"),
        ("box", "x", "and not mask, box"),
        ("click3", "x", "and not mask, box"),
    ]:
        config = default.get_config()
        config.eval.sets[name] = root
        with pytest.raises(UserError, match=f"eval.sets.{name}.*{words}"):
            config_lib.check(config)
    config = default.get_config()
    config.eval.sets.boxes = "x"
    config_lib.check(config)


def test_files_and_variants_are_named():
    assert config_lib.load_file(SMOKE + ":tiny").model.variant == "tiny"
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        config_lib.load_file(SMOKE + ":tinny")
    with pytest.raises(UserError, match="no file 'configs/smok.py'"):
        config_lib.load_file("configs/smok.py")


def test_config_comes_first_whatever_the_order():
    assert config_lib.split_arguments(["--a=1", "--config=x.py", "-b"]) == ("x.py", ["--a=1", "-b"])
    assert config_lib.split_arguments(["--config", "x.py", "--a"]) == ("x.py", ["--a"])
    assert config_lib.split_arguments(["--config.a=1"]) == ("", ["--config.a=1"])


def test_workdir_is_named_after_config_and_variant():
    config = davis.get_config()
    assert config_lib.default_workdir("configs/davis.py", config) == "runs/davis-tiny"
    assert config_lib.default_workdir("configs/smoke.py:nano", smoke.get_config()) == (
        "runs/smoke-nano"
    )


def train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.steps=abc"], "--config.train.steps=abc"),
        (["--workdr=x"], "'workdr'. Did you mean: workdir"),
        (["--config.mesh.fsdp=3"], "mesh.fsdp=3"),
    ],
)
def test_the_script_says_it_in_one_line_with_status_2(arguments, words, tmp_path):
    done = train(f"--config={SMOKE}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_helps():
    done = train("--help")
    assert done.returncode == 0
    assert "--config=configs/smoke.py" in done.stdout
    assert "--coordinator_address" in done.stdout
