"""Gradients against the reference's in float64, whichever way gates open that float32 cannot tell.

The derivative of a ReLU jumps where its input is 0, that of a maximum where the two largest are
equal. Of a million such gates in a clip some have an input that is smaller than float32's
rounding, so that two faithful programs may open them differently, with gradients that differ by
far more than rounding. Both are right. So where a gradient is not that of the reference, it must
be that of the reference with some of those very gates (and no others) turned.
"""
# pyright: reportMissingImports=false

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from tests.parity import tolerances
from tests.parity.cases import Chosen
from tests.parity.compare import judge, record
from tests.parity.rollout import float64, train_forward

SAMPLED = 4096  # elements of a parameter's gradient by which gates are chosen, at random
Gradient = dict[str, np.ndarray]
Gate = tuple[int, int]  # the call, and the place in its input


class Relu(torch.autograd.Function):
    """A ReLU whose gates can be turned after the forward pass."""

    @staticmethod
    def forward(ctx: Any, x, gate):
        ctx.gate = gate
        return x * gate

    @staticmethod
    def backward(ctx: Any, *grads):
        return grads[0] * ctx.gate, None


class Largest(torch.autograd.Function):
    """The largest of the last axis; which one gets the gradient can be changed afterwards."""

    @staticmethod
    def forward(ctx: Any, x, index):
        ctx.index, ctx.size = index, x.shape[-1]
        return x.gather(-1, index)[..., 0]

    @staticmethod
    def backward(ctx: Any, *grads):
        return functional.one_hot(ctx.index[..., 0], ctx.size) * grads[0][..., None], None


class Gates:
    """The ReLUs and 2 x 2 maxima of one forward pass, in the order of calls."""

    def __init__(self):
        self.distances: list[torch.Tensor] = []  # of each gate's input from where it turns
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []  # as it is, and turned

    def relu(self, x, inplace=False):
        gate = (x.detach() > 0).to(x.dtype).contiguous()
        self.distances.append(x.detach().abs().clone())
        self.states.append((gate, 1 - gate))
        return Relu.apply(x, gate)

    def max_pool2d(self, x, *args, **kwargs):
        n, c, h, w = x.shape
        cut = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
        windows = cut.transpose(3, 4).flatten(-2)
        order = windows.detach().argsort(dim=-1, descending=True, stable=True)
        two = windows.detach().gather(-1, order[..., :2])
        gap = two[..., 0] - two[..., 1]
        # Equal numbers come of equal inputs (padding), and whichever it is makes no difference
        self.distances.append(torch.where(gap > 0, gap, torch.inf)[..., None])
        first, second = order[..., :1].contiguous(), order[..., 1:2].contiguous()
        self.states.append((first, second))
        return Largest.apply(windows, first)

    @contextlib.contextmanager
    def watch(self, model: torch.nn.Module):
        """Within it the model's ReLUs and maxima are these."""
        relu = functional.relu
        holders: list[Any] = [m for m in model.modules() if getattr(m, "activation", 0) is relu]
        for module in holders:
            module.activation = self.relu
        with (
            mock.patch.object(functional, "relu", self.relu),
            mock.patch.object(functional, "max_pool2d", self.max_pool2d),
        ):
            yield
        for module in holders:
            module.activation = relu

    def turn(self, call: int, index: int) -> None:
        """Exchange one gate's state for the other."""
        now, other = (x.view(-1) for x in self.states[call])
        now[index], other[index] = other[index].clone(), now[index].clone()


def gradient(model: torch.nn.Module, loss: torch.Tensor, keep: bool = False) -> Gradient:
    """Of every parameter that has one; `keep` the graph for another."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return {n: g.numpy() for n, g in zip(names, grads, strict=True) if g is not None}


class Truth:
    """The reference's gradient in float64, and its own error in float32.

    Gates are tried where a parameter's gradient is off by more than the median may be. `hurried`,
    only where the reference's float32, in whichever order, is not off by half as much with gates of
    its own turned: a clip of a large model takes minutes to turn them all.
    """

    def __init__(self, chosen: Chosen, hurried: bool = False):
        self.chosen, self.hurried = chosen, hurried

        def of(model) -> Gradient:
            run = train_forward(model, chosen.batch, chosen.plan, chosen.run.drawn)
            return gradient(model, run.losses["core_loss"])

        with float64():
            self.exact = of(chosen.exact_model)
        self.rounded = of(chosen.model)
        assert self.exact.keys() == self.rounded.keys()
        self.total = norm(self.exact.values())
        self.known: list[Errors | None] = []  # of runs in float32
        self.turned: dict[Gate, np.ndarray] | None = None  # what turning each in doubt adds
        self.by_gates = {frozenset[Gate](): self.exact}  # gradients by the gates that are turned

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
                truth = found and (self.exact if self.hurried else self.nearest(found)[0])
                self.known.append(self.errors(found, truth) if found and truth else None)
            if known := self.known[i]:
                yield known

    def in_order(self, i: int) -> Gradient | None:
        """In float32 in one of its orders of summation; None if it takes another decision."""
        return self.chosen.in_order(
            i, lambda run: gradient(self.chosen.model, run.losses["core_loss"])
        )

    def nearest(self, ours: Gradient) -> tuple[Gradient, int]:
        """The exact gradient, with those gates in doubt turned that bring it nearest to ours.

        Returns also how many were turned: none where rounding alone explains the difference.
        """
        if self.is_rounding(self.errors(ours, self.exact)):
            return self.exact, 0
        if self.turned is None:
            self.turned = self.turn_each()
        residual = self.sampled(ours) - self.sampled(self.exact)
        left, chosen = dict(self.turned), []
        while left:
            nearest = min(left, key=lambda gate: np.linalg.norm(residual - left[gate]))
            after = residual - left.pop(nearest)
            if np.linalg.norm(after) > tolerances.WORTHWHILE * np.linalg.norm(residual):
                break
            residual = after
            chosen.append(nearest)
        gates = frozenset(chosen)
        if gates not in self.by_gates:
            self.by_gates[gates] = self.with_turned(gates)
        return self.by_gates[gates], len(gates)

    def is_rounding(self, plain: "Errors") -> bool:
        """Whether no gate needs to be turned to explain these errors."""
        if not self.hurried:
            return max(plain.relative.values()) <= tolerances.GRADIENT_MEDIAN
        noise, median = dict.fromkeys(plain.relative, 0.0), 0.0
        for own in self.own():
            noise = {name: max(x, own.relative[name]) for name, x in noise.items()}
            median = max(median, own.median())
            if plain.median() <= max(tolerances.GRADIENT_MEDIAN, tolerances.OWN * median) and all(
                error <= max(tolerances.GRADIENT, tolerances.OWN * noise[name])
                for name, error in plain.relative.items()
            ):
                return True
        return False

    def sampled(self, g: Gradient) -> np.ndarray:
        """Some elements of every parameter that has a gradient, in units of its norm.

        Which gates to turn shows in these; whole gradients of forty gates are too many to hold.
        """
        found = []
        for name, x in self.exact.items():
            scale = float(np.linalg.norm(x))
            if scale > max(tolerances.NO_GRADIENT * self.total, 1e-30):
                flat = g[name].ravel()
                if x.size > SAMPLED:
                    flat = flat[np.random.default_rng(0).integers(x.size, size=SAMPLED)]
                found.append(flat * ((x.size / len(flat)) ** 0.5 / scale))
        return np.concatenate(found)

    def with_turned(self, chosen: Iterable[Gate]) -> Gradient:
        """The exact gradient with some gates turned."""
        gates, c = Gates(), self.chosen
        with float64(), gates.watch(c.exact_model):
            run = train_forward(c.exact_model, c.batch, c.plan, c.run.drawn)
            for at in chosen:
                gates.turn(*at)
            return gradient(c.exact_model, run.losses["core_loss"])

    def turn_each(self) -> dict[Gate, np.ndarray]:
        """What turning each gate that float32 cannot tell adds to `sampled` of the exact one."""
        c = self.chosen
        rounded, counted, exact = Gates(), Gates(), Gates()
        with rounded.watch(c.model), torch.no_grad():
            train_forward(c.model, c.batch, c.plan, c.run.drawn)
        with float64(), counted.watch(c.exact_model), torch.no_grad():
            train_forward(c.exact_model, c.batch, c.plan, c.run.drawn)
        doubtful = []
        for call, (mine, true) in enumerate(zip(rounded.distances, counted.distances, strict=True)):
            difference = (mine.double() - true).abs().nan_to_num(0.0, posinf=0.0)
            close_by = true.flatten() <= tolerances.OWN * difference.max()
            doubtful += [(call, int(i)) for i in close_by.nonzero()]
        if len(doubtful) > tolerances.MOST_GATES:
            return {}
        with float64(), exact.watch(c.exact_model):
            loss = train_forward(c.exact_model, c.batch, c.plan, c.run.drawn).losses["core_loss"]
            found, before = {}, self.sampled(self.exact)
            for at in doubtful:
                exact.turn(*at)
                found[at] = self.sampled(gradient(c.exact_model, loss, keep=True)) - before
                exact.turn(*at)
        return found


def norm(arrays) -> float:
    """Euclidean, of all together."""
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays)))


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
    rounded = truth.nearest(truth.rounded)[0]
    largest = {
        name: float(
            max(np.abs(ours[name] - x).max(), np.abs(truth.rounded[name] - rounded[name]).max())
        )
        for name, x in exact.items()
    }
    return Compared(exact, largest)
