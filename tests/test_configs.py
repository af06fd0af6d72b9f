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
    codes = [path.read_text() for path in files if not path.name.endswith("_checks.py")]
    for key in config_lib.flat_keys(default.get_config()):
        section, leaf = ("config." + key).rsplit(".", 2)[-2:]

        def reads(code: str, section: str = section, leaf: str = leaf) -> bool:
            names = [section, *re.findall(rf"(\w+) = (?:\w+\.)+{section}\b", code)]
            patterns = [rf"\b{name}\.{leaf}\b" for name in names]
            if section == "data":  # the settings of every source, config.data and others
                patterns += [rf"\b(source|entry|part)\.{leaf}\b"]
            return any(re.search(p, code) for p in [*patterns, rf"\*\*\w+\.{section}\b"])

        assert any(map(reads, codes)), key


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
    with pytest.raises(UserError, match="eval.sets.a.b has a dot in its name: call it a-b"):
        config_lib.split_sets(["--config.eval.sets.a.b=c"])
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


def test_a_report_is_found_in_both_forms():
    for given in (["-v", "--replay=a b.json"], ["--replay", "a b.json", "-v"]):
        assert config_lib.report_of(given) == "a b.json"
    assert config_lib.report_of(["--config.replay=x", "--v=--replay=x"]) == ""


def test_of_a_key_given_twice_the_last_counts():
    given = ["--config.a.b=('x',)", "-v", "--config.a.c", "-1", "--config.a.b", "('y',)"]
    expected = ["-v", "--config.a.c=-1", "--config.a.b=('y',)"]
    assert config_lib.last_of_each(given) == expected
    assert config_lib.last_of_each(["--config.a", "--noconfig.a"]) == ["--noconfig.a"]


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
