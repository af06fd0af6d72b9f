"""Comparing arrays, and keeping the largest error of every part for the report."""
# pyright: reportMissingImports=false

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tests.parity import tolerances


class Worst(NamedTuple):
    """The largest of what a part's comparisons found."""

    error: float
    noise: float | None  # of the reference's float32 against its float64; None: not measured
    tolerance: float


WORST: dict[str, Worst] = {}


def record(part: str, error: float, tolerance: float, noise: float | None = None) -> None:
    """Keep the largest error, noise and tolerance of a part."""
    old = WORST.get(part, Worst(0.0, None, 0.0))
    noises = [x for x in (noise, old.noise) if x is not None]
    WORST[part] = Worst(
        max(error, old.error), max(noises) if noises else None, max(tolerance, old.tolerance)
    )


def judge(
    part: str, error: float, tolerance: float, noises: Iterable[float], name: str = ""
) -> float:
    """Assert that an error is within its tolerance, or as small as the reference's own allows.

    `noises` are the errors of the reference's float32 runs, of which more are asked for only as
    long as those so far do not allow for ours. Returns the bound.
    """
    noise = bound = 0.0
    for found in noises:
        noise = max(noise, found)
        bound = max(tolerance, tolerances.OWN * noise)
        if error <= bound:
            break
    if bound <= tolerance:
        record(part, error, tolerance, noise)
    else:
        record(f"{part}, in units of the reference's own", error / noise, tolerances.OWN, noise)
    assert error <= bound, f"{part} {name}: {error:.2e} > {bound:.1e}"
    return bound


def array(x) -> np.ndarray:
    """A float64 array of anything."""
    return np.asarray(x.detach().numpy() if hasattr(x, "detach") else x, np.float64)


def close(
    part: str,
    ours,
    theirs,
    tolerance: float = tolerances.MODULE,
    name: str = "",
) -> None:
    """Assert equality up to `tolerance` times the largest magnitude."""
    error, _ = distance(part, ours, theirs, 0.0, name)
    record(part, error, tolerance)
    assert error <= tolerance, f"{part} {name}: {error:.2e} > {tolerance:.1e}"


def close_to_exact(
    part: str, ours, runs: Iterable, exact, tolerance: float, scale: float = 0.0, name: str = ""
) -> float:
    """The same measured from the reference in float64, of which `runs` are its runs in float32.

    The bound, a share of the largest magnitude or of `scale`, is at least `OWN` times the largest
    error of theirs. Returns the bound.
    """
    error, used = distance(part, ours, exact, scale, name)
    noises = (distance(part, theirs, exact, used, name)[0] for theirs in runs)
    return judge(part, error, tolerance, noises, name)


def distance(part: str, found, exact, scale: float, name: str) -> tuple[float, float]:
    """Largest difference of two arrays by the largest magnitude of the second, and that."""
    found, exact = array(found), array(exact)
    assert found.shape == exact.shape, f"{part} {name}: {found.shape} {exact.shape}"
    assert np.isfinite(exact).all(), f"{part} {name}"
    scale = max(float(np.abs(exact).max(initial=0)), scale, 1e-30)
    return float(np.abs(found - exact).max(initial=0)) / scale, scale


def first(x) -> Any:
    """Channels-last to channels-first, a torch tensor."""
    import torch

    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def last(x) -> np.ndarray:
    """A torch tensor, channels-first to channels-last."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def same_mask(part: str, ours, exact, tolerance: float) -> None:
    """Assert that logits have the same sign wherever the reference's is not near zero."""
    ours, exact = array(ours), array(exact)
    far = np.abs(exact) > tolerance * np.abs(exact).max(initial=1e-30)
    wrong = int((((ours > 0) != (exact > 0)) & far).sum())
    record(part, float(wrong), 0.0)
    assert wrong == 0, f"{part}: {wrong} pixels differ"
