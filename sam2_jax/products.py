"""In what accelerators multiply numbers of float32."""

import contextlib
from collections.abc import Iterator

import jax

FULL = "float32"


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Within it JAX traces products and convolutions of float32 for a computation in `precision`.

    By JAX's default TPUs round their factors to bfloat16 first, and recent GPUs to TF32. With
    "float32" that is not so; with any other precision the default stays, since the little that such
    a step multiplies in float32 needs no more. CPUs always multiply in full. Also a decorator of
    what is traced, and then good for whatever thread traces it.
    """
    with jax.default_matmul_precision(FULL) if precision == FULL else contextlib.nullcontext():
        yield
