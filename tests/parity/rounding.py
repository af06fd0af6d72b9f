"""The reference in float32 with other roundings: the same numbers, summed in other orders."""
# pyright: reportMissingImports=false

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from tests.parity import reference, tolerances
from tests.parity.rollout import float64


@contextlib.contextmanager
def reordered(seed: int):
    """Within it products of matrices, convolutions, norms and attention add in an order at random.

    What they return is in its usual order; all axes that the forward or the backward pass sums
    over are shuffled within: channels, rows (tokens and objects), keys and queries.
    """
    generator = torch.Generator().manual_seed(seed)
    products, convolve = functional.linear, functional.conv2d
    normalise, attend = functional.layer_norm, functional.scaled_dot_product_attention

    def order(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A permutation and its inverse."""
        permutation = torch.randperm(size, generator=generator)
        return permutation, permutation.argsort()

    def linear(x, weight, bias=None):
        rows = x.reshape(-1, x.shape[-1])
        (r, back_r), (i, _), (o, back_o) = map(order, (len(rows), *weight.shape[::-1]))
        out = products(rows[r][:, i], weight[o][:, i], None if bias is None else bias[o])
        return out[back_r][:, back_o].reshape(*x.shape[:-1], len(weight))

    def conv2d(x, weight, bias=None, *args, **kwargs):
        if x.shape[1] != weight.shape[1]:  # groups
            return convolve(x, weight, bias, *args, **kwargs)
        (r, back_r), (i, _), (o, back_o) = map(order, (len(x), *weight.shape[1::-1]))
        out = convolve(
            x[r][:, i], weight[o][:, i], None if bias is None else bias[o], *args, **kwargs
        )
        return out[back_r][:, back_o]

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        i, back = order(x.shape[-1])
        scale, shift = (a if a is None else a[i] for a in (weight, bias))
        return normalise(x[..., i], shape, scale, shift, eps)[..., back]

    def attention(query, key, value, *args, **kwargs):
        (q, back_q), (k, _), (c, _) = map(order, (*query.shape[-2:-1], *key.shape[-2:]))
        mixed = query[..., q, :][..., c], key[..., k, :][..., c], value[..., k, :]
        return attend(*mixed, *args, **kwargs)[..., back_q, :]

    ways = {
        "linear": linear,
        "conv2d": conv2d,
        "layer_norm": layer_norm,
        "scaled_dot_product_attention": attention,
    }
    with mock.patch.multiple(functional, **ways):
        yield


def given(x: Any) -> torch.Tensor:
    """An array as an input of the reference, in float64 where that is what it computes in."""
    tensor = torch.as_tensor(x)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def exactly(function: Callable, model: Any) -> Any:
    """`function` of the model in float64."""
    with float64(), torch.no_grad():
        return function(reference.exact_copy(model))


def roundings(function: Callable, model: Any, first: int = 0) -> Iterator[Any]:
    """`function` of the model in float32 as it is (0), then in other orders of summation."""
    for i in range(first, 1 + tolerances.ORDERS):
        with reordered(i - 1) if i else contextlib.nullcontext(), torch.no_grad():
            found = function(model)
        yield found
