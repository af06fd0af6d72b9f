"""Comparison with the reference, where torch and the `sam2` package are installed.

`--parity-seed` draws other weights, clips and prompts (`0-3` four of each); `--parity-variant`
takes another size and `--parity-resolution` another side of its images; `--parity-json` writes the
errors to a file.
"""
# pyright: reportMissingImports=false

import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.parity import compare

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "sam2", "training"))
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]
close = compare.close


def pytest_sessionfinish(session):
    """What a worker of pytest-xdist found goes to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = {k: tuple(x) for k, x in compare.WORST.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for part, (error, noise, tolerance) in (
        getattr(node, "workeroutput", {}).get("parity", {}).items()
    ):
        compare.record(part, error, tolerance, noise)


def pytest_terminal_summary(terminalreporter, config):
    """Largest error of every part, relative to the largest number in it."""
    if not compare.WORST:
        return
    terminalreporter.section("parity: largest error, the reference's own in float32, tolerance")
    for part, worst in sorted(compare.WORST.items()):
        noise = "   -   " if worst.noise is None else f"{worst.noise:.1e}"
        terminalreporter.line(f"{worst.error:.1e}  {noise}  {worst.tolerance:g}  {part}")
    if path := config.getoption("--parity-json"):
        report = {
            "seeds": config.getoption("--parity-seed"),
            "variant": config.getoption("--parity-variant"),
            "resolution": resolution_of(config),
            "parts": {part: worst._asdict() for part, worst in sorted(compare.WORST.items())},
        }
        pathlib.Path(path).write_text(json.dumps(report, indent=1) + "\n")


def resolution_of(config) -> int:
    default = 64 if config.getoption("--parity-variant") == "nano" else 256
    return config.getoption("--parity-resolution") or default


def pytest_collection_modifyitems(config, items):
    """Tests marked `nano` are for that size only."""
    if config.getoption("--parity-variant") != "nano":
        others = [item for item in items if item.get_closest_marker("nano")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_generate_tests(metafunc):
    """Every seed in one process: most of a test's time it traces and compiles, once for all."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", metafunc.config.getoption("--parity-seed"), scope="session")


class Pair(NamedTuple):
    """The same weights in the reference and here."""

    reference: Any
    model: Any
    params: Mapping
    variant: str


@pytest.fixture(scope="session")
def resolution(request) -> int:
    return resolution_of(request.config)


@pytest.fixture(scope="session")
def is_nano(request) -> bool:
    return request.config.getoption("--parity-variant") == "nano"


@pytest.fixture(scope="session")
def make_pair(request, seed, resolution):
    """A function kind -> Pair, each built once: "2.0", "2.1" or "faint" (2.1, see `build`)."""
    import jax
    import torch

    from sam2_jax.convert import from_reference
    from sam2_jax.model.sam2 import init_params, make_sam2
    from tests.parity import reference

    name = request.config.getoption("--parity-variant")
    torch.set_num_threads(1 if name == "nano" else len(os.sched_getaffinity(0)))
    made: dict[str, Pair] = {}

    def make(kind: str) -> Pair:
        if kind not in made:
            model = make_sam2(name, resolution, "2.1" if kind == "faint" else kind)
            theirs = reference.build(model.variant, resolution, kind, seed)
            like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
            params = from_reference(reference.state_of(theirs), like)
            made[kind] = Pair(theirs, model, params, name)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def pair(make_pair) -> Pair:
    return make_pair("2.1")


@pytest.fixture(scope="session")
def step(is_nano):
    """Our training pass, see `ours.make_step`: one for all tests, for it compiles for long."""
    from tests.parity.ours import make_step

    return make_step("none" if is_nano else "frame")


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def draw(rng):
    """Normal numbers of a shape."""

    def normal(*shape) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return normal


@pytest.fixture(scope="session")
def call():
    """A method of ours, jitted: once for all seeds."""
    import jax

    @functools.cache
    def compiled(model, method):
        return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))

    return lambda pair, method, *args: compiled(pair.model, method)(pair.params, *args)
