"""ReLUs and maxima of the reference whose gates can be turned after the forward pass."""
# pyright: reportMissingImports=false

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from tests.parity import tolerances

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
        order = windows.detach().argsort(dim=-1, descending=True, stable=True)[..., :2].contiguous()
        two = windows.detach().gather(-1, order)
        gap = two[..., 0] - two[..., 1]
        # Equal numbers come of equal inputs (padding), and whichever it is makes no difference
        self.distances.append(torch.where(gap > 0, gap, torch.inf))
        self.states.append(order)
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
        try:
            with (
                mock.patch.object(functional, "relu", self.relu),
                mock.patch.object(functional, "max_pool2d", self.max_pool2d),
                mock.patch.object(functional, "linear", linear),
            ):
                yield
        finally:
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


def norm(arrays) -> float:
    """Euclidean, of all together."""
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays)))
