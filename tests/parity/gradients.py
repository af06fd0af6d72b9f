"""Gradients against the reference's in float64, whichever way gates open that float32 cannot tell.

The derivative of a ReLU jumps where its input is 0, that of a maximum where the two largest are
equal. Of a million such gates in a clip some have an input that is smaller than float32's
rounding, so that two faithful programs may open them differently, with gradients that differ by
far more than rounding. Both are right. So where a gradient is not that of the reference, it must
be that of the reference with some of those very gates (and no others) turned.
"""
# pyright: reportMissingImports=false

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from tests.parity import reference, tolerances
from tests.parity.cases import Chosen
from tests.parity.compare import judge, record
from tests.parity.rollout import float64, train_forward

Gradient = dict[str, np.ndarray]
Gate = tuple[int, int]  # the call, and the place in its output


class Relu(torch.autograd.Function):
    """A ReLU whose gates can be turned after the forward pass."""

    @staticmethod
    def forward(ctx: Any, x, gates, call):
        ctx.gates, ctx.call = gates, call
        return x * gates.states[call]

    @staticmethod
    def backward(ctx: Any, *grads):
        ctx.gates.flows[ctx.call] = grads[0]
        return grads[0] * ctx.gates.states[ctx.call], None, None


class Largest(torch.autograd.Function):
    """The largest of the last axis; which one gets the gradient can be changed afterwards."""

    @staticmethod
    def forward(ctx: Any, x, gates, call):
        ctx.gates, ctx.call, ctx.size = gates, call, x.shape[-1]
        return x.gather(-1, gates.states[call][..., :1])[..., 0]

    @staticmethod
    def backward(ctx: Any, *grads):
        ctx.gates.flows[ctx.call] = grads[0]
        first = ctx.gates.states[ctx.call][..., 0]
        return functional.one_hot(first, ctx.size) * grads[0][..., None], None, None


class Effect(NamedTuple):
    """What turning a gate adds to the gradient of one row of the weights just before it."""

    gate: Gate
    weight: str
    row: int
    change: np.ndarray


class Gates:
    """The ReLUs and 2 x 2 maxima of one forward pass, in the order of calls.

    In the reference each reads what a linear layer wrote.
    """

    def __init__(self):
        self.distances: list[torch.Tensor] = []  # of each gate's input from where it turns
        # Of a ReLU whether it is open, of a maximum the places of the largest and the next
        self.states: list[torch.Tensor] = []
        self.sources: list[tuple[torch.Tensor, torch.Tensor]] = []  # the layer's input and weights
        self.flows: dict[int, torch.Tensor] = {}  # gradient of each gate's output
        self.layer = (torch.zeros(0), torch.zeros(0))  # input and weights of the last one

    def relu(self, x, inplace=False):
        assert x.shape == (*self.layer[0].shape[:-1], len(self.layer[1]))
        self.distances.append(x.detach().abs())
        self.states.append(x.detach() > 0)
        self.sources.append(self.layer)
        return Relu.apply(x, self, len(self.states) - 1)

    def max_pool2d(self, x, *args, **kwargs):
        n, c, h, w = x.shape
        assert (n, h, w) == self.layer[0].shape[:-1] and c <= len(self.layer[1])
        cut = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
        windows = cut.transpose(3, 4).flatten(-2)
        two = windows.detach().topk(2).values
        gap = two[..., 0] - two[..., 1]
        # Equal numbers come of equal inputs (padding), and whichever it is makes no difference
        self.distances.append(torch.where(gap > 0, gap, torch.inf))
        order = windows.detach().argsort(dim=-1, descending=True, stable=True)
        self.states.append(order[..., :2].contiguous())
        self.sources.append(self.layer)
        return Largest.apply(windows, self, len(self.states) - 1)

    @contextlib.contextmanager
    def watch(self, model: torch.nn.Module):
        """Within it the model's ReLUs and maxima are these."""
        relu, product = functional.relu, functional.linear
        holders: list[Any] = [m for m in model.modules() if getattr(m, "activation", 0) is relu]

        def linear(x, weight, bias=None):
            self.layer = (x.detach(), weight)
            return product(x, weight, bias)

        for module in holders:
            module.activation = self.relu
        with (
            mock.patch.object(functional, "relu", self.relu),
            mock.patch.object(functional, "max_pool2d", self.max_pool2d),
            mock.patch.object(functional, "linear", linear),
        ):
            yield
        for module in holders:
            module.activation = relu

    def turn(self, call: int, index: int) -> None:
        """Exchange one gate's state for the other."""
        states = self.states[call]
        if states.dtype == torch.bool:
            states.view(-1)[index] ^= True
        else:
            places = states.view(-1, 2)
            places[index] = places[index].flip(0)

    def effects(
        self, call: int, where: torch.Tensor, names: dict[int, str], whole: Gradient
    ) -> Iterator[Effect]:
        """Of turning each of a call's gates on the gradient; not of the negligible.

        `names` of the weights by their `id`.
        """
        if call not in self.flows:  # no loss reads it
            return
        (x, weight), states, flow = self.sources[call], self.states[call], self.flows[call]
        through = flow.reshape(-1)[where]
        if states.dtype == torch.bool:
            token, row = where // len(weight), where % len(weight)
            change = x.reshape(-1, x.shape[-1])[token]
            change = change * torch.where(states.view(-1)[where], -through, through)[:, None]
        else:
            n, row, *at = torch.unravel_index(where, flow.shape)
            first, second = (
                x[n, 2 * at[0] + place // 2, 2 * at[1] + place % 2]
                for place in states.view(-1, 2)[where].T
            )
            change = (second - first) * through[:, None]
        name = names[id(weight)]
        heard = change.norm(dim=1) > tolerances.WORTHWHILE * norm([whole[name]])
        for i in heard.nonzero()[:, 0].tolist():
            yield Effect((call, int(where[i])), name, int(row[i]), change[i].numpy())


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> Gradient:
    """Of every parameter that has one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g.numpy() for n, g in zip(names, grads, strict=True) if g is not None}


class Truth:
    """The reference's gradient in float64, and its own error in float32."""

    def __init__(self, chosen: Chosen):
        self.chosen = chosen
        rounded, gates = Gates(), Gates()
        self.rounded = self.watched(chosen.model, rounded)
        with float64():
            self.exact = self.watched(chosen.exact_model, gates)
        assert self.exact.keys() == self.rounded.keys()
        self.total = norm(self.exact.values())
        self.known: list[Errors | None] = []  # of runs in float32
        self.by_gates = {frozenset[Gate](): self.exact}  # gradients by the gates that are turned
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
                self.known.append(self.errors(found, self.nearest(found)[0]) if found else None)
            if known := self.known[i]:
                yield known

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
        gates = frozenset(turned)
        if gates not in self.by_gates:
            with float64():
                self.by_gates[gates] = self.watched(self.chosen.exact_model, Gates(), gates)
        return self.by_gates[gates], len(gates)


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
    assert turned <= tolerances.MOST_GATES
    rounded = truth.nearest(truth.rounded)[0]
    largest = {
        name: float(
            max(np.abs(ours[name] - x).max(), np.abs(truth.rounded[name] - rounded[name]).max())
        )
        for name, x in exact.items()
    }
    return Compared(exact, largest)
