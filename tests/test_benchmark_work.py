"""Counting the work of a step on both sides: alike, and by plan, part and pass."""
# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from sam2_jax import work
from sam2_jax.benchmarks import ours, parts, plans, reference
from sam2_jax.model.attention import attention
from sam2_jax.model.layers import xla_conv
from sam2_jax.model.variants import VARIANTS
from sam2_jax.types import PromptPlan

NEEDED = pytest.mark.skipif(bool(reference.missing()), reason="the reference is not installed")
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


@NEEDED
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


def small_config(frames=3, objects=2):
    config = default.get_config("nano")
    config.model.resolution, config.data.num_frames = 64, frames
    config.data.max_objects = objects
    config.train.precision = "float32"
    config.train.remat = "frame"
    return config


@pytest.fixture(scope="module")
def counted():
    given = {name: plans.make(name, 3, 7) for name in ("mask1", "mask2", "point12")}
    config = small_config()
    return ours.count(config, given), ours.count(config, given, recomputed=True)


def total(scopes):
    return work.total(scopes.values()).total


def test_plans_cost_what_they_do(counted):
    once, again = counted
    assert all(work.total(x.values()).guessed == 0 for x in (*once.values(), *again.values()))
    # Two prompted frames look at no memory; corrections are passes of the decoder
    assert total(once["mask2"]) < total(once["mask1"]) < total(once["point12"])
    for name in once:
        assert total(once[name]) < total(again[name])


def test_adapters_pay_for_their_way_back():
    """As for a kernel that is trained: that of the product, of which its factors' follow."""
    config, given = small_config(2, 1), {"mask2": plans.make("mask2", 2, 7)}
    config.lora.rules = ((("image_encoder/trunk/*",), 2, 2.0),)
    passes = parts.by_part(ours.count(config, given)["mask2"])["image encoder"]
    assert 1.8 < passes[parts.BACKWARD] / passes[parts.FORWARD] < 2


def test_parts_and_passes_add_up(counted):
    once, again = counted
    found = parts.by_part(once["mask1"])
    whole = sum(sum(passes.values()) for passes in found.values())
    assert whole == pytest.approx(total(once["mask1"]) / 1e12)
    assert {"image encoder", "memory: cross-attention", "mask decoder"} <= found.keys()
    for part, passes in found.items():
        assert passes[parts.AGAIN] == 0
        if part.startswith("memory: "):  # gradients of the inputs and of the weights
            assert passes[parts.BACKWARD] == pytest.approx(2 * passes[parts.FORWARD])
    assert parts.by_part(again["mask1"])["memory: cross-attention"][parts.AGAIN] > 0
    # No memory is looked at by two prompted frames of two
    less = parts.by_part(once["mask2"])["memory: cross-attention"][parts.FORWARD]
    assert less < found["memory: cross-attention"][parts.FORWARD]


@NEEDED
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


@pytest.mark.parametrize("name", ["mask1", "mask2", "point11", "point12", "point22", "box12"])
def test_a_plan_is_what_its_name_says(name):
    plan = PromptPlan(**plans.make(name, 8, 7))
    kind, cond, corrected = plans.parse(name)
    assert plan.is_cond.sum() == cond and plan.is_cond[0]
    assert plan.is_corrected.sum() == corrected
    assert bool(plan.use_points) == (kind != "mask")
    assert plan.is_box.sum() == (cond if kind == "box" else 0)
    assert sorted(plan.order) == list(range(8)) and plan.is_cond[plan.order[:cond]].all()
    assert plan.from_truth.shape == (8, 7) and not plan.from_truth.any()


def test_the_script_answers_in_the_references_order():
    plan = plans.make("box12", 8, 7)
    script = reference.Script(plan)
    assert script.random() < 0.5  # points or boxes
    assert script.integers(1, 2, endpoint=True) == 1
    assert script.integers(1, 2, endpoint=True) == 2
    assert script.random() < 0.5  # a box
    assert script.choice(range(1, 8), 1, replace=False).tolist() == [4]
    assert all(script.random() > 0.1 for _ in range(2 * 7))
    assert script.is_finished()
