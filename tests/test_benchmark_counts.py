"""Counts of our work and of the reference's: by the same rules, and those of a real step."""
# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import work
from sam2_jax.benchmarks import plans, reference
from sam2_jax.model.attention import attention
from sam2_jax.model.layers import xla_conv
from sam2_jax.model.variants import VARIANTS

pytestmark = pytest.mark.skipif(bool(reference.missing()), reason="the reference is not installed")
SHAPES = {
    "linear": ((6, 5), (5, 7)),
    "convolution": ((2, 9, 9, 3), (3, 3, 3, 4)),
    "strided convolution": ((2, 8, 8, 3), (4, 4, 3, 5)),
    "transposed convolution": ((2, 4, 4, 3), (3, 2, 2, 5)),
    "attention": ((2, 6, 1, 8), (2, 9, 1, 8), (2, 9, 1, 4)),
}


def ours_of(kind, x, w, *more):
    if kind == "linear":
        return x @ w
    if kind == "transposed convolution":
        return jnp.einsum("nhwc,cijd->nhiwjd", x, w)
    if kind == "attention":
        return attention(x, w, *more)[0]
    return xla_conv(x, w, stride=4 if kind.startswith("strided") else 1, pad=0)


def theirs_of(kind, x, w, *more):
    from torch.nn import functional as f

    if kind == "linear":
        return f.linear(x, w.T)
    if kind == "attention":
        return f.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (x, w, *more)))
    x = x.permute(0, 3, 1, 2)
    if kind == "transposed convolution":
        return f.conv_transpose2d(x, w.permute(0, 3, 1, 2), stride=2)
    return f.conv2d(x, w.permute(3, 2, 0, 1), stride=4 if kind.startswith("strided") else 1)


@pytest.mark.parametrize("kind", SHAPES)
def test_both_counters_agree(kind):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shapes = SHAPES[kind]
    given = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        out = theirs_of(kind, *given)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    once = work.count(lambda *xs: ours_of(kind, *xs), *arrays).total
    both = jax.value_and_grad(lambda *xs: ours_of(kind, *xs).sum(), tuple(range(len(shapes))))
    assert once == forward.get_total_flops() > 0
    assert work.count(both, *arrays).total == once + backward.get_total_flops() == 3 * once


@pytest.mark.parametrize("name", ["mask1", "box11"])
def test_the_references_work_is_that_of_a_real_step(name):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from sam2_jax.benchmarks import reference_work

    frames, objects, side, plan = 2, 2, 64, plans.make(name, 2, 7)
    variant = VARIANTS["nano"]._asdict()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = reference.make_side(variant, side)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, frames, side, side, 3), np.uint8)
    masks = np.zeros((1, frames, objects, side, side), bool)
    masks[..., 10:40, 20:30] = True
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = reference.step(model, reference.datapoint(images, masks), plan)
    assert np.isfinite(loss)
    found = reference_work.count(variant, (1, frames, objects, side), {name: plan})[name]
    assert found["whole"] == counter.get_total_flops()
    assert 2 < found["whole"] / found["forward"] < 3.5
