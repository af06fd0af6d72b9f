"""Gradients against the reference's in float64, whichever way gates open that float32 cannot tell.

The derivative of a ReLU jumps where its input is 0, that of a maximum where the two largest are
equal. Of a million such gates in a clip some have an input that is smaller than float32's
rounding, so that two faithful programs may open them differently, with gradients that differ by
far more than rounding. Both are right. So where a gradient is not that of the reference, it must
be that of the reference with some of those very gates (and no others) turned.
"""
# pyright: reportMissingImports=false

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from tests.parity import reference, tolerances
from tests.parity.cases import Chosen
from tests.parity.compare import judge, record
from tests.parity.gates import Effect, Gate, Gates, Gradient, norm
from tests.parity.rollout import float64, train_forward


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> Gradient:
    """Of every parameter that has one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g.numpy() for n, g in zip(names, grads, strict=True) if g is not None}


class Truth:
    """The reference's gradient in float64, and its own error in float32.

    That is what is left when its own gates are accounted for, too, or, `plain`, all of it: of a
    released size the gradient with other gates takes a minute, for each of its runs.
    """

    def __init__(self, chosen: Chosen, plain: bool = False):
        self.chosen, self.plain = chosen, plain
        rounded, gates = Gates(), Gates()
        self.rounded = self.watched(chosen.model, rounded)
        with float64():
            self.exact = self.watched(chosen.exact_model, gates)
        assert self.exact.keys() == self.rounded.keys()
        self.total = norm(self.exact.values())
        self.known: list[Errors | None] = []  # of runs in float32
        self.last = frozenset[Gate](), self.exact  # gates that were turned, and the gradient then
        self.doubtful: dict[tuple[str, int], list[Effect]] = {}  # by weight and row
        names = {id(x): name for name, x in chosen.exact_model.named_parameters()}
        for call, (mine, true) in enumerate(zip(rounded.distances, gates.distances, strict=True)):
            difference = (mine.double() - true).abs().nan_to_num(0.0, posinf=0.0)
            close_by = true.flatten() <= tolerances.OWN * difference.max()
            for effect in gates.effects(call, close_by.nonzero()[:, 0], names, self.exact):
                self.doubtful.setdefault((effect.weight, effect.row), []).append(effect)

    def watched(self, model: reference.Reference, gates: Gates, turned=()) -> Gradient:
        """The gradient with some gates turned; `gates` keeps what passed them."""
        c = self.chosen
        with gates.watch(model):
            run = train_forward(model, c.batch, c.plan, c.run.drawn)
            for at in turned:
                gates.turn(*at)
            return gradient(model, run.losses["core_loss"])

    def errors(self, found: Gradient, truth: Gradient) -> "Errors":
        """How far a gradient is from `truth`: this one, or that with gates turned."""
        relative, where_none = {}, {}
        for name, x in truth.items():
            error = float(np.linalg.norm(found[name] - x))
            if np.linalg.norm(self.exact[name]) > tolerances.NO_GRADIENT * self.total:
                relative[name] = error / float(np.linalg.norm(x))
            else:
                where_none[name] = float(np.linalg.norm(found[name])) / self.total
        return Errors(relative, where_none)

    def own(self) -> Iterator["Errors"]:
        """Of the reference in float32 as it is, then in other orders of summation, as needed."""
        for i in range(1 + tolerances.ORDERS):
            if i == len(self.known):
                found = self.rounded if i == 0 else self.in_order(i - 1)
                self.known.append(self.errors(found, self.own_truth(found)) if found else None)
            if known := self.known[i]:
                yield known

    def own_truth(self, found: Gradient) -> Gradient:
        """What one of its own gradients in float32 is compared with."""
        return self.exact if self.plain else self.nearest(found)[0]

    def in_order(self, i: int) -> Gradient | None:
        """In float32 in one of its orders of summation; None if it takes another decision."""
        return self.chosen.in_order(
            i, lambda run: gradient(self.chosen.model, run.losses["core_loss"])
        )

    def nearest(self, found: Gradient) -> tuple[Gradient, int]:
        """The exact gradient with those gates in doubt turned that `found` turned, and how many.

        None where rounding alone explains the difference. A turned gate shows in one row of the
        weights before it, where it stands out from rounding, which is in all rows.
        """
        plain = self.errors(found, self.exact)
        if max(plain.relative.values()) <= tolerances.GRADIENT_MEDIAN:
            return self.exact, 0
        turned = set[Gate]()
        for (weight, row), effects in self.doubtful.items():
            residual, left = found[weight][row] - self.exact[weight][row], list(effects)
            while left:
                after = [residual - effect.change for effect in left]
                best = int(np.argmin([np.linalg.norm(x) for x in after]))
                if np.linalg.norm(after[best]) > tolerances.EXPLAINS * np.linalg.norm(residual):
                    break
                residual = after[best]
                turned.add(left.pop(best).gate)
        if not turned:
            return self.exact, 0
        if turned != self.last[0]:
            with float64():
                exact = self.watched(self.chosen.exact_model, Gates(), turned)
            self.last = frozenset(turned), exact
        return self.last[1], len(turned)


class Errors(NamedTuple):
    """Of every parameter's gradient."""

    relative: dict[str, float]  # of those that have one
    where_none: dict[str, float]  # of the others, as a share of the gradient of all

    def median(self) -> float:
        return float(np.median(list(self.relative.values())))


class Compared(NamedTuple):
    """The gradient that ours was compared with, and how well float32 knows it."""

    exact: Gradient  # float64, with gates as ours
    noise: dict[str, float]  # largest error of an element, ours or the reference's in float32


def compare_gradients(truth: Truth, ours: Gradient, part: str = "gradient") -> Compared:
    """Assert that ours is the reference's gradient, by the rules of `tolerances`."""
    for name, value in ours.items():
        assert np.isfinite(value).all(), name
        if name not in truth.exact:  # never reached: the reference has None, or it is a buffer
            assert not value.any(), name
    exact, turned = truth.nearest(ours)
    found = truth.errors(ours, exact)
    for name, error in found.where_none.items():
        own = (x.where_none[name] for x in truth.own())
        judge(f"{part} where there is none", error, tolerances.NO_GRADIENT_LEFT, own, name)
    for name, error in found.relative.items():
        own = (x.relative[name] for x in truth.own())
        judge(part, error, tolerances.GRADIENT, own, name)
    own = (x.median() for x in truth.own())
    judge(f"{part}, median", found.median(), tolerances.GRADIENT_MEDIAN, own)
    record(f"{part}: gates turned", float(turned), float(tolerances.MOST_GATES))
    assert turned <= tolerances.MOST_GATES
    rounded = truth.own_truth(truth.rounded)
    largest = {
        name: float(
            max(np.abs(ours[name] - x).max(), np.abs(truth.rounded[name] - rounded[name]).max())
        )
        for name, x in exact.items()
    }
    return Compared(exact, largest)
