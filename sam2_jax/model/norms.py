"""Layer normalisation that keeps no more for its backward pass than its input and two numbers.

Left to automatic differentiation a norm keeps three arrays of its input's size, and on a CPU it
writes its scale, repeated for every token, to memory before it multiplies by it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from sam2_jax.types import Array

EPSILON_2D = 1e-6  # of the reference's LayerNorm2d


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(
    x: Float[Array, "*n c"], scale: Float[Array, " c"], bias: Float[Array, " c"], epsilon: float
) -> Float[Array, "*n c"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Mean and variance in float32, two passes as torch, and so the result unless `scale` is wider.
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x: Any, scale: Any, bias: Any, epsilon: float) -> tuple[Any, Any]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    return (wide - mean) * inverse * scale + bias, (x, scale, bias, mean, inverse)


def _backward(epsilon: float, kept: Any, grad: Any) -> tuple[Any, Any, Any]:
    """Of the normalised input that part of the gradient is lost which shifts or stretches it."""
    del epsilon
    x, scale, bias, mean, inverse = kept
    unit = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(grad.ndim - 1))
    inner = grad * scale
    shift = inner.mean(-1, keepdims=True)
    stretch = (inner * unit).mean(-1, keepdims=True)
    to_x = (inner - shift - unit * stretch) * inverse
    to_scale = (grad * unit).sum(rows).astype(scale.dtype)
    return to_x.astype(x.dtype), to_scale, grad.sum(rows).astype(bias.dtype)


normalise.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm. Its leaves are `scale` and `bias`."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalise(x, scale, bias, self.epsilon)


class LayerNorm2d(nn.Module):
    """Normalises every pixel over its channels. Its leaves are `weight` and `bias`.

    The names tell it from `LayerNorm` (`scale`), which the reference exempts from weight decay
    while this one decays. Source: facebookresearch/sam2@2b90b9f sam2_utils.py.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalise(x, weight, bias, EPSILON_2D)
