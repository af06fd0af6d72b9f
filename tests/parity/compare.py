"""Comparing arrays, and keeping the largest error of every part for the report."""
# pyright: reportMissingImports=false

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


def judge(part: str, error: float, tolerance: float, noise: float, name: str = "") -> None:
    """Assert that an error is within its tolerance, or as small as the reference's own allows."""
    own = tolerances.OWN * noise
    if own <= tolerance:
        record(part, error, tolerance, noise)
    else:
        record(f"{part}, in units of the reference's own", error / noise, tolerances.OWN, noise)
    bound = max(tolerance, own)
    assert error <= bound, f"{part} {name}: {error:.2e} > {bound:.1e}"


def array(x) -> np.ndarray:
    """A float64 array of anything."""
    return np.asarray(x.detach().numpy() if hasattr(x, "detach") else x, np.float64)


def close(
    part: str,
    ours,
    theirs,
    tolerance: float = tolerances.MODULE,
    scale: float = 0.0,
    name: str = "",
    exact=None,
) -> float:
    """Assert equality up to `tolerance` times the largest magnitude (at least `scale`).

    With `exact`, the reference in float64, errors are measured from that, and the bound is at
    least `OWN` times the error of `theirs`. Returns the error.
    """
    ours, theirs = array(ours), array(theirs)
    truth = theirs if exact is None else array(exact)
    assert ours.shape == theirs.shape == truth.shape, f"{part} {name}: {ours.shape} {truth.shape}"
    assert np.isfinite(truth).all(), f"{part} {name}"
    scale = max(float(np.abs(truth).max(initial=0)), scale, 1e-30)
    error = float(np.abs(ours - truth).max(initial=0)) / scale
    if exact is None:
        record(part, error, tolerance)
        assert error <= tolerance, f"{part} {name}: {error:.2e} > {tolerance:.1e}"
    else:
        noise = float(np.abs(theirs - truth).max(initial=0)) / scale
        judge(part, error, tolerance, noise, name)
    return error


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
