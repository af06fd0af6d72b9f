"""Small layers that the parts of SAM 2 share.

Precision follows the kernels: a product is computed in its kernel's dtype, whatever its input's.
All else promotes, so that beside kernels in bfloat16 norms and residual sums stay in float32, as
under torch's autocast.

Source: facebookresearch/sam2@2b90b9f sam2_utils.py. Initialisation is torch's default (uniform,
variance 1 / (3 fan_in)) with zero biases.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from sam2_jax.types import Array

torch_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def dense(features: int, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    """torch.nn.Linear, in the dtype of its kernel."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=torch_uniform,
        promote_dtype=_to_kernel_dtype,
        dot_general=_rows_times,
        name=name,
    )


def _rows_times(x: Any, kernel: Any, dimension_numbers: Any, **_: Any) -> Any:
    return product(x, kernel)


def product(x: Float[Array, "*n c"], kernel: Float[Array, "c d"]) -> Float[Array, "*n d"]:
    """x @ kernel as a product of two matrices, and so the gradient of the kernel.

    Summed over several axes XLA would transpose an operand of that gradient, which on a CPU takes
    longer than the product.
    """
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


def _to_kernel_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """nn.Dense's hook for input, kernel and bias (or None)."""
    del dtype, inexact
    return [None if x is None else x.astype(args[1].dtype) for x in args]


@jax.custom_jvp
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Exact GELU: Flax's default is the tanh approximation, JAX's exact one a slower erfc.

    In float32, as torch inside: where erf is near -1 bfloat16 would have nothing left of the sum.
    Of it the backward pass keeps the slope alone.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


@gelu.defjvp
def _gelu_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    wide = x.astype(jnp.float32)
    below = _normal_cdf(wide)
    slope = below + wide * jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * below).astype(x.dtype), slope.astype(x.dtype) * t


class Conv(nn.Module):
    """torch.nn.Conv2d on channels-last arrays, for kernels no larger than twice their stride."""

    features: int
    size: int = 1
    stride: int = 1
    pad: int = 0

    @nn.compact
    def weights(self, channels: int) -> tuple[Array, Array]:
        """(kernel, bias) for inputs of so many channels."""
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", torch_uniform, shape)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j d"]:
        kernel, bias = self.weights(x.shape[-1])
        x, bias = x.astype(kernel.dtype), bias.astype(kernel.dtype)
        if self.size == 1:
            return product(x, kernel[0, 0]) + bias
        return strided_conv(x, kernel, self.stride, self.pad) + bias

    def after(self, first: "Conv", x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        """`self(first(x))` of two convolutions of size 1, as one product with x.

        Where `first` widens what this one narrows, a fraction of the work and of the memory.
        """
        kernel, bias = self.weights(first.features)
        # In full: the composed kernel is rounded once, as each of the two would be
        wide, wide_bias = (
            jnp.matmul(
                y.astype(jnp.float32),
                kernel[0, 0].astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            for y in first.weights(x.shape[-1])
        )
        bias = (wide_bias + bias).astype(kernel.dtype)
        return product(x.astype(kernel.dtype), wide[0, 0].astype(kernel.dtype)) + bias


def xla_conv(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "k k c2 d"],
    *,
    stride: int,
    pad: int,
    groups: int = 1,
) -> Float[Array, "n i j d"]:
    """torch.nn.functional.conv2d with a square kernel, zero padding `pad` on every side."""
    return jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def strided_conv(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c d"], stride: int, pad: int
) -> Float[Array, "n i j d"]:
    """Convolution with stride > 1, zero padding `pad` and k <= 2 stride; h, w multiples of stride.

    On a CPU the input is cut into blocks of stride x stride and the kernel into at most 2 x 2
    such blocks, so that forward and backward are plain products: up to a tenth of the time of
    XLA's convolutions there. Elsewhere it is XLA's convolution.
    """

    def blocks(x, kernel):
        n, h, w, c = x.shape
        rows, cols, size = h // stride, w // stride, kernel.shape[0]
        reach = -(-size // stride)  # blocks that a kernel spans
        far = (reach - 1) * stride - pad
        x = jnp.pad(x, ((0, 0), (pad, far), (pad, far), (0, 0)))
        x = x.reshape(n, rows + reach - 1, stride, cols + reach - 1, stride, c)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        out = jnp.zeros((n, rows, cols, kernel.shape[-1]), jnp.result_type(x, kernel))
        for i in range(reach):
            for j in range(reach):
                taps = kernel[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
                part = x[:, i : i + rows, j : j + cols, : taps.shape[0], : taps.shape[1]]
                depth = taps.shape[0] * taps.shape[1] * c
                out += product(part.reshape(n, rows, cols, depth), taps.reshape(depth, -1))
        return out

    return jax.lax.platform_dependent(
        x, kernel, cpu=blocks, default=functools.partial(xla_conv, stride=stride, pad=pad)
    )


class Upsample2(nn.Module):
    """torch.nn.ConvTranspose2d with kernel 2 and stride 2: every pixel becomes 2 x 2."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        # torch's fan-in of a transposed convolution counts the output channels
        init = nn.initializers.variance_scaling(
            1.0 / 3.0, "fan_in", "uniform", in_axis=(1, 2, 3), out_axis=0
        )
        n, h, w, c = x.shape
        kernel = self.param("kernel", init, (c, 2, 2, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, bias = x.astype(kernel.dtype), bias.astype(kernel.dtype)
        y = product(x, kernel.reshape(c, -1)).reshape(n, h, w, 2, 2, self.features)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, self.features) + bias


class Mlp(nn.Module):
    """Dense layers with an activation between them; optionally a sigmoid at the end."""

    hidden: int
    out: int
    depth: int
    use_gelu: bool = False
    use_sigmoid: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        for i in range(self.depth - 1):
            x = dense(self.hidden, f"layers_{i}")(x)
            x = gelu(x) if self.use_gelu else jax.nn.relu(x)
        x = dense(self.out, f"layers_{self.depth - 1}")(x)
        return jax.nn.sigmoid(x) if self.use_sigmoid else x


def _depthwise_shifts(x: Float[Array, "n h w c"], kernel: Float[Array, "k k 1 c"]) -> jax.Array:
    """Depthwise convolution as a sum of shifted products, which XLA's CPU backend vectorises."""
    size = kernel.shape[0]
    pad = size // 2
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return sum(
        padded[:, i : i + h, j : j + w] * kernel[i, j] for i in range(size) for j in range(size)
    )  # pyright: ignore[reportReturnType]


@jax.custom_vjp
def _depthwise_cpu(x, kernel):
    return _depthwise_shifts(x, kernel)


def _depthwise_cpu_forward(x, kernel):
    return _depthwise_shifts(x, kernel), (x, kernel)


def _depthwise_cpu_backward(saved, grad):
    x, kernel = saved
    size = kernel.shape[0]
    pad = size // 2
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def row(i):  # a loop over rows: all taps at once take three times as long to compile
        band = jax.lax.dynamic_slice_in_dim(padded, i, h, 1)
        return jnp.stack([(band[:, :, j : j + w] * grad).sum((0, 1, 2)) for j in range(size)])

    taps = jax.lax.map(row, jnp.arange(size))
    return _depthwise_shifts(grad, kernel[::-1, ::-1]), taps.reshape(kernel.shape)


_depthwise_cpu.defvjp(_depthwise_cpu_forward, _depthwise_cpu_backward)


def depthwise_conv(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "n h w c"]:
    """Depthwise convolution of odd size with zero padding that keeps the shape.

    XLA's own is about a hundred times slower than torch's on a CPU, so there (and only there) it
    is a sum of shifted products.
    """

    xla = functools.partial(xla_conv, stride=1, pad=kernel.shape[0] // 2, groups=x.shape[-1])
    return jax.lax.platform_dependent(x, kernel, cpu=_depthwise_cpu, default=xla)
