"""Position codes: sine, random Fourier, rotary, one-dimensional temporal, and torch's bicubic.

Source: facebookresearch/sam2@2b90b9f position_encoding.py, sam2_utils.py, hieradet.py.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sam2_jax.types import Array


def _frequencies(count: int, temperature: float) -> np.ndarray:
    """Wavelengths of a sine code; neighbours share one, for sine and cosine."""
    index = np.arange(count, dtype=np.float32)
    return temperature ** (2 * (index // 2) / count)


@functools.lru_cache
def sine_grid(height: int, width: int, channels: int) -> Float[np.ndarray, "h w c"]:
    """Sine code of a grid, y channels before x, sine and cosine interleaved.

    Coordinates count from 1 and are scaled to (0, 2 pi].
    """
    waves = _frequencies(channels // 2, 10000.0)

    def code(size: int) -> np.ndarray:
        steps = np.arange(1, size + 1, dtype=np.float32)
        phase = (steps / (steps[-1] + 1e-6) * 2 * np.pi)[:, None] / waves
        return np.stack([np.sin(phase[:, 0::2]), np.cos(phase[:, 1::2])], -1).reshape(size, -1)

    y = np.broadcast_to(code(height)[:, None], (height, width, channels // 2))
    x = np.broadcast_to(code(width)[None, :], (height, width, channels // 2))
    return np.concatenate([y, x], -1).astype(np.float32)


def sine_1d(position: Float[Array, " k"], channels: int) -> Float[Array, "k c"]:
    """Temporal code of object pointers: all sines, then all cosines (not interleaved)."""
    phase = position[:, None] / _frequencies(channels // 2, 10000.0)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)


def fourier(points: Float[Array, "*n 2"], gaussian: Float[Array, "2 f"]) -> Float[Array, "*n c"]:
    """Random Fourier features of points in 0-1 (x, y); `c` is twice `f`. SAM 1, section A."""
    phase = 2 * jnp.pi * ((2 * points - 1) @ gaussian)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)


def fourier_grid(height: int, width: int, gaussian: Float[Array, "2 f"]) -> Float[Array, "h w c"]:
    """Random Fourier features of the pixel centres of a grid."""
    x = jnp.broadcast_to((jnp.arange(width) + 0.5) / width, (height, width))
    y = jnp.broadcast_to(((jnp.arange(height) + 0.5) / height)[:, None], (height, width))
    return fourier(jnp.stack([x, y], -1), gaussian)


@functools.lru_cache
def rotary_table(side: int, channels: int) -> Float[np.ndarray, "n 2 f"]:
    """Cosine and sine of the axial rotary angles of a side x side grid, x frequencies first."""
    freqs = 1.0 / 10000.0 ** (np.arange(0, channels, 4, dtype=np.float32) / channels)
    index = np.arange(side * side)
    angles = np.concatenate(
        [np.outer(index % side, freqs), np.outer(index // side, freqs)], -1, dtype=np.float32
    )
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def rotate(x: Float[Array, "*b n c"], table: Float[Array, "n 2 f"]) -> Float[Array, "*b n c"]:
    """Rotary code (RoFormer): neighbouring channel pairs are turned by their angle, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[:, 0], table[:, 1]
    real = pairs[..., 0] * cos - pairs[..., 1] * sin
    imag = pairs[..., 0] * sin + pairs[..., 1] * cos
    return jnp.stack([real, imag], -1).reshape(x.shape).astype(x.dtype)


@functools.lru_cache
def bicubic_matrix(out_size: int, in_size: int) -> Float[np.ndarray, "o i"]:
    """Weights of torch's bicubic interpolation along one axis (align_corners=False).

    torch uses Keys' kernel with a = -0.75 and repeats the border; jax.image.resize uses
    a = -0.5 and renormalises, which gives other numbers.
    """
    a = -0.75

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    centre = (np.arange(out_size) + 0.5) * in_size / out_size - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((out_size, in_size), np.float64)
    for tap in range(-1, 3):
        source = np.clip(first + tap, 0, in_size - 1)
        np.add.at(matrix, (np.arange(out_size), source), kernel(centre - (first + tap)))
    return matrix.astype(np.float32)
