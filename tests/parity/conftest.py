"""Comparison with the reference, where torch and the `sam2` package are installed.

`--parity-seed` draws other weights, clips and prompts; `--parity-variant` takes another size.
"""
# pyright: reportMissingImports=false

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "sam2", "training"))
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]
RESOLUTION = 64
ERRORS: dict[str, float] = {}


def pytest_terminal_summary(terminalreporter):
    """Largest error of every part, relative to the largest number in it."""
    if ERRORS:
        terminalreporter.section("parity: largest errors")
        for name, error in sorted(ERRORS.items()):
            terminalreporter.line(f"{error:.1e}  {name}")


class Pair(NamedTuple):
    """The same weights in the reference and here."""

    reference: Any
    model: Any
    params: Mapping


def close(
    part: str, ours, theirs, tolerance: float = 1e-5, scale: float = 0.0, name: str = ""
) -> float:
    """Assert equality up to `tolerance` times the largest magnitude (at least `scale`)."""
    if hasattr(theirs, "detach"):
        theirs = theirs.detach().numpy()
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{part} {name}: {ours.shape} {theirs.shape}"
    assert np.isfinite(theirs).all(), f"{part} {name}"
    scale = max(float(np.abs(theirs).max(initial=0)), scale, 1e-30)
    error = float(np.abs(ours - theirs).max(initial=0)) / scale
    ERRORS[part] = max(error, ERRORS.get(part, 0.0))
    assert error <= tolerance, f"{part} {name}: {error:.2e} > {tolerance:.0e}"
    return error


@pytest.fixture(scope="session")
def seed(request) -> int:
    return request.config.getoption("--parity-seed")


@pytest.fixture(scope="session")
def make_pair(request, seed):
    """A function kind -> Pair, each built once: "2.0", "2.1" or "faint" (2.1, see `build`)."""
    import jax
    import torch

    from sam2_jax.convert import from_reference
    from sam2_jax.model.sam2 import init_params, make_sam2
    from tests.parity import reference

    torch.set_num_threads(1)
    name = request.config.getoption("--parity-variant")
    made: dict[str, Pair] = {}

    def make(kind: str) -> Pair:
        if kind not in made:
            model = make_sam2(name, RESOLUTION, "2.1" if kind == "faint" else kind)
            theirs = reference.build(model.variant, RESOLUTION, kind, seed)
            like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
            params = from_reference(reference.state_of(theirs), like)
            made[kind] = Pair(theirs, model, params)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def pair(make_pair) -> Pair:
    return make_pair("2.1")


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)
