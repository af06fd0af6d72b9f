"""Operations of single equations that are more than they seem: products, and whole kernels."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend import core


def dot_work(eqn: Any) -> int:
    """Two operations for each element of the output and each of what is summed over."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return (
        2 * int(np.prod(eqn.outvars[0].aval.shape)) * int(np.prod([shape[i] for i in contracted]))
    )


def pallas_work(eqn: Any) -> int:
    """Products of a Pallas kernel, at every point of its grid.

    Of its conditionals, which ask where in the grid it is, the branch with most work is taken.
    """
    return int(np.prod(eqn.params["grid_mapping"].grid)) * _products(eqn.params["jaxpr"])


def _products(jaxpr: core.Jaxpr) -> int:
    work = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            work += dot_work(eqn)
        elif name == "cond":
            work += max(_products(branch.jaxpr) for branch in params["branches"])
        else:
            inner = (x for x in params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr))
            done = sum(_products(x.jaxpr if isinstance(x, core.ClosedJaxpr) else x) for x in inner)
            if done and name == "while":
                raise ValueError("a kernel has work in a loop of an unknown number of turns")
            work += done * params.get("length", 1)  # of a scan
    return work


def cudnn_work(eqn: Any, wide: int, narrow: int) -> int:
    """Products of cuDNN's attention: so many as wide as keys, so many as wide as values."""
    (n, queries, heads, d), (_, keys, _, dv) = (eqn.invars[i].aval.shape for i in (0, 2))
    return 2 * n * heads * queries * keys * (wide * d + narrow * dv)


# By the primitive's name; the backward pass of attention makes the weights again
KERNELS: dict[str, Callable[[Any], int]] = {
    "pallas_call": pallas_work,
    "dot_product_attention_fwd_wrapper": functools.partial(cudnn_work, wide=1, narrow=1),
    "dot_product_attention_bwd_wrapper": functools.partial(cudnn_work, wide=3, narrow=2),
}
