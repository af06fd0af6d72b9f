"""Learning rates as functions of the step, traceable, float32."""

import jax.numpy as jnp
import optax


def cosine(start: float, end: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """end + (start - end) / 2 * (1 + cos(pi * step / steps)), times a linear warm-up if asked.

    As in the reference the first update uses `start` itself (written so that rounding keeps it)
    and the last stops short of `end`.
    """

    def schedule(step):
        where = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
        value = start - 0.5 * (start - end) * (1 - jnp.cos(jnp.pi * where))
        return value * jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)

    return schedule
