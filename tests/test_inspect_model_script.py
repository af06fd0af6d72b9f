"""scripts/inspect_model.py: what is shown of each parameter is what training does with it."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import default
from sam2_jax import config as config_lib
from sam2_jax import optim, recipe, sharding
from sam2_jax.model.sam2 import init_params, make_sam2
from tests.test_convert_script import load_script

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    return load_script("inspect_model")


@pytest.fixture(scope="module")
def config():
    c = default.get_config("nano")
    c.optim.frozen = ("image_encoder/neck/*",)
    c.optim.learning_rate = (
        (("image_encoder/*",), ("cosine", 3e-6, 3e-7)),
        (("*",), ("linear", 5e-6, 5e-7)),
    )
    c.train.steps = 100
    return config_lib.finish(c)


@pytest.fixture(scope="module")
def found(script, config):
    return script.inspect(config, sharding.make_mesh(1, 4, 1), 50)


def test_rates_decay_and_layout(found):
    by_path = {p["path"]: p for p in found["parameters"]}
    blocks = [path for path in by_path if path.endswith("attn/qkv/kernel")]
    first, last = by_path[min(blocks)], by_path["memory_attention/layers_0_linear1/kernel"]
    # Halfway; layer decay is 0.9 per block from the last
    rate = 3e-7 + 2.7e-6 / 2
    np.testing.assert_allclose(
        first["options"]["learning_rate"], rate * 0.9 ** len(blocks), rtol=1e-5
    )
    np.testing.assert_allclose(last["options"]["learning_rate"], 2.75e-6, rtol=1e-5)
    assert first["options"]["weight_decay"] == 0.1
    assert first["class"] == "Dense"
    norm = by_path["image_encoder/trunk/blocks_0/norm1/scale"]
    assert norm["options"]["weight_decay"] == 0.0 and norm["class"] == "LayerNorm"
    assert norm["sharding"] == "on every device"
    assert last["sharding"] == "axis 0 over fsdp"
    assert last["shape"][0] < last["shape"][1]  # the smallest is split
    held = {path for path, p in by_path.items() if p["frozen"]}
    neck = {path for path in by_path if path.startswith("image_encoder/neck/")}
    assert held == neck | {"sam_prompt_encoder/gaussian"}
    assert all(by_path[path]["options"] == {} for path in held)


def test_nothing_is_missing(found, config):
    model = make_sam2("nano", config.model.resolution)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert sum(p["count"] for p in found["parameters"]) == sum(
        leaf.size for leaf in jax.tree.leaves(shapes)
    )
    optimizer = optim.make_optimizer(recipe.make_optim_settings(config), shapes, "2.1")
    assert {p["path"]: p["group"] for p in found["parameters"]} == optimizer.labels
    for group in found["groups"]:
        of = [p for p in found["parameters"] if p["group"] == group["group"]]
        assert (group["arrays"], group["count"]) == (len(of), sum(p["count"] for p in of))


def test_tables(script, found):
    lines = script.table(script.parameter_rows(found)).splitlines()
    assert lines[0].split() == "path class shape count rate decay sharding group".split()
    assert len(lines) == 1 + len(found["parameters"])
    (line,) = [x for x in lines if x.startswith("memory_attention/layers_0_linear1/kernel ")]
    assert " 2.75e-06    0.1  axis 0 over fsdp  *: rate 5e-06 to 5e-07 (linear), decay 0.1" in line
    (line,) = [x for x in lines if x.startswith("sam_prompt_encoder/gaussian ")]
    assert line.endswith("-      -  on every device   frozen")
    *groups, trained, everything = script.group_rows(found)
    counts = [int(row["count"].replace(",", "")) for row in (trained, everything)]
    frozen = next(row for row in groups if row["group"] == "frozen")
    assert counts[0] == counts[1] - int(frozen["count"].replace(",", ""))
    assert everything["share"] == "100.0%"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/inspect_model.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_script_reads_no_data(tmp_path):
    """The default config has no data, and a workdir is not made."""
    file = tmp_path / "parameters.json"
    done = run("--config=configs/davis.py:nano", "--step=10", f"--json={file}")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["step"] == 10
    assert len(done.stdout.splitlines()) > len(report["parameters"]) > 300
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--step=3000", "--step=3000 must be at least 0 and less than train.steps=3000"),
        ("--config.optim.frozen=class:Dens", "'Dens' holds parameters: those that do are CXBlock"),
        ("--config.optim.name=adam", "did you mean 'adamw'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(argument, words):
    done = run("--config=configs/davis.py:nano", argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert words in done.stderr
