"""Counting the work of our step by plan, part and pass."""

import pytest

from configs import default
from sam2_jax import work
from sam2_jax.benchmarks import ours, parts, plans, reference
from sam2_jax.types import PromptPlan


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
