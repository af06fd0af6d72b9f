"""What dropout keeps, of attention weights above all: a draw that is cheap and can be repeated.

A weight's fate is a function of its key, query and position, so whoever computes a block of the
weights, in whatever order, on however many devices and on whatever platform, finds the same draw.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray, UInt32

from sam2_jax.types import Array


class Draw(NamedTuple):
    """A random number for every query and every key; `kept` makes one for every pair of them."""

    rows: UInt32[Array, "n heads q"]
    columns: UInt32[Array, "n heads k"]


def make_draw(key: PRNGKeyArray, n: int, heads: int, queries: int, keys: int) -> Draw:
    """The draw of a `key` on all weights of an attention."""
    of_rows, of_columns = jax.random.split(key)
    return Draw(
        jax.random.bits(of_rows, (n, heads, queries), jnp.uint32),
        jax.random.bits(of_columns, (n, heads, keys), jnp.uint32),
    )


def probability(rate: float) -> float:
    """Exact probability with which `kept` keeps a weight: 1 - rate, to a multiple of 2^-32."""
    return _threshold(rate) / 2**32


def kept(draw: Draw, rate: float) -> Bool[Array, "n heads q k"]:
    """Which weights stay, independently of each other, each with `probability(rate)`.

    JAX's own generator takes ten times as long (a hundred operations for a word; on a CPU as long
    as the matrix products of the attention). A query's and a key's random words are added, and the
    sum is scrambled by two rounds of multiplying and shifting: the integer hash `lowbias32` of
    Chris Wellons' hash-prospector, whose last shift only concerns bits that are not looked at.
    """
    x = draw.rows[..., None] + draw.columns[..., None, :]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x < jnp.uint32(_threshold(rate))


def dropped(x: Float[Array, "n heads q k"], draw: Draw, rate: float) -> Float[Array, "n heads q k"]:
    """What of x is kept, scaled so that its expectation stays; else 0."""
    return jnp.where(kept(draw, rate), x / probability(rate), 0.0)


def _threshold(rate: float) -> int:
    return min(round((1.0 - rate) * 2**32), 2**32 - 1)
