"""What the compiler for TPUs makes of attention; no TPU is needed."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from sam2_jax import topology
from sam2_jax.model import fused
from sam2_jax.products import multiplying
from tests.offline import without_compilation_cache  # noqa: F401

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed"
    ),
    pytest.mark.usefixtures("without_compilation_cache"),
]
TOPOLOGY = "v5e:2x2"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("heads", "d", "dv"), [(1, 256, 64), (8, 56, 56)])
def test_flash_attention_compiles(heads, d, dv, dtype):
    """Of memory attention and of the trunk, forward and backward, some keys left out."""
    where = jax.sharding.SingleDeviceSharding(topology.open_target(TOPOLOGY).devices[0])

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    def loss(query, key, value, mask):
        return fused.flash(query, key, value, mask).astype(jnp.float32).sum()

    shapes = [shape(2, n, heads, c) for n, c in ((256, d), (640, d), (640, dv))]
    with multiplying(dtype):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, shape(2, 640, dtype=bool))
    text = lowered.compile().as_text() or ""
    # Forward, and backward for queries and for keys with values
    assert text.count('custom_call_target="tpu_custom_call"') >= 3
