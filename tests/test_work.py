"""Counting operations: products, convolutions, loops, branches, and a whole training step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from configs import smoke
from sam2_jax import config as config_lib
from sam2_jax import losses, objective, partition, prompts, recipe, sharding, train, work
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import Batch

ONE = 2 * 4**3  # one product of two 4 x 4
X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
WHICH = jnp.array([0, 1, 2, 2])  # 0 + 1 + 2 + 2 products


def switched(x, w, which):
    """A loop whose turns take different branches, each recomputed in the backward pass."""
    branches = [lambda c: c, lambda c: c @ w, lambda c: (c @ w) @ w]

    def body(carry, i):
        return lax.switch(i, branches, carry), None

    return lax.scan(jax.checkpoint(body), x, which)[0].sum()


def test_products():
    a, b = jax.ShapeDtypeStruct((3, 2, 5), jnp.float32), jnp.ones((3, 5, 7))
    found = work.count(jnp.matmul, a, b)
    assert found == (2 * 3 * 2 * 5 * 7, 0, 0) and found.total == 420
    assert work.count(lambda x: x + 1, X).total == 0
    assert work.count(lambda x: (x @ x, x)[1], X).total == 0  # nobody reads it


def test_the_branch_taken_is_counted_in_every_turn():
    assert work.count(lambda x, w: switched(x, w, WHICH), X, X) == (5 * ONE, 0, 0)
    assert work.count(switched, X, X, WHICH) == (5 * ONE, 0, 0)
    unknown = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert work.count(switched, X, X, unknown) == (8 * ONE, 0, 4)


def test_gradients_with_recomputation():
    both = jax.grad(lambda x, w: switched(x, w, WHICH), argnums=(0, 1))
    # Forward 5; again what a turn keeps, not its end: 0 + 0 + 1 + 1; two backward for each
    assert work.count(both, X, X).dot == (5 + 2 + 10) * ONE
    for_x = jax.grad(lambda x, w: switched(x, w, WHICH))
    assert work.count(for_x, X, X).dot <= (5 + 2 + 5) * ONE


def test_loops_with_counters():
    def counted(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]

    assert work.count(counted, X).dot == 3 * ONE

    def endless(x):
        return lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ x, x)

    with pytest.raises(ValueError, match="number of turns"):
        work.count(endless, X)

    def nested(x):  # as many turns as the outer loop has made
        def outer(i, x):
            return lax.fori_loop(0, i, lambda _, y: y @ y, x)

        return lax.fori_loop(0, 4, outer, x)

    assert work.count(nested, X).dot == (0 + 1 + 2 + 3) * ONE


def test_calls_are_entered():
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))
    assert work.count(jax.jit(double), X).dot == ONE
    assert work.count(jax.grad(lambda x: jax.jit(double)(x).sum()), X).dot == 2 * ONE
    assert work.count(jax.vmap(lambda x: jnp.tanh(x) @ x), jnp.ones((3, 4, 4))).dot == 3 * ONE


def test_known_keys_give_the_draws_that_are_made():
    def drawn(key, x):
        return lax.cond(jax.random.bernoulli(key), lambda: x @ x, lambda: x)

    for seed in range(6):
        key = jax.random.key(seed)
        assert work.count(drawn, key, X).dot == ONE * int(jax.random.bernoulli(key))


@pytest.mark.parametrize("which", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 3)])
def test_convolutions_as_xla_counts_them(which, stride, groups):
    def loss(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(1, 1), (0, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    x = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3 // groups, 6), jnp.float32)
    once = work.count(loss, x, kernel)
    # XLA: transcendental and elementwise operations aside, the same for the forward pass
    analysis: Any = jax.jit(loss).lower(x, kernel).compile().cost_analysis()
    assert once.conv == once.total == analysis["flops"]
    if which:
        grad = jax.grad(lambda x, kernel: loss(x, kernel).sum(), which)
        assert work.count(grad, x, kernel).conv == len(which) * once.conv


def test_the_platform_decides():
    def either(x):
        return lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x @ x)

    assert work.count(either, X).dot == ONE
    assert work.count(either, X, platform="cpu").dot == 0


def step_work(plan, frozen=()):
    """Work of a step of nano at 64 pixels, and that of its image encoder."""
    c = smoke.get_config()
    c.model.resolution = 64
    c.optim.learning_rate = 1e-3
    c.optim.frozen = frozen
    c = config_lib.finish(c)
    model = make_sam2("nano", 64)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    optimizer, shapes = recipe.make_config_optimizer(c, shapes)
    weights = losses.LossWeights()
    step = train.make_train_step(
        optimizer,
        loss_fn=objective.make_loss(model, weights, "none", 1, False),
        sample_plan=lambda key, t: plan,
        mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
    )
    state = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), shapes)
    t, s = len(plan.order), jax.ShapeDtypeStruct
    images: Any = s((2, t, 64, 64, 3), jnp.uint8)
    masks: Any = s((2, t, 1, 64, 64), bool)
    valid: Any = s((2, 1), bool)
    batch = Batch(images, masks, valid)
    found = work.count(step, state, batch, s((), jax.random.key(0).dtype))

    def encode(params):
        flat = jnp.zeros((2 * t, 64, 64, 3))
        return model.apply({"params": params}, flat, method="encode_image")

    def pass_of(*learnt):
        def run(params, other):
            features, pull = jax.vjp(lambda p: encode(partition.join(other, p)), params)
            return features, pull(features)

        return work.count(run, *partition.split(shapes, lambda path: path.startswith(learnt))).total

    # The decoder's convolutions are one product with the neck's and learn whatever is frozen
    decoder = "sam_mask_decoder/conv_s"
    return found, pass_of("image_encoder/", decoder) - pass_of(decoder)


@pytest.fixture(scope="module")
def whole():
    return step_work(prompts.mask_plan(2))


def test_a_step_of_a_plan_is_known_exactly(whole):
    found, _ = whole
    assert found.guessed == 0 and found.total > 0
    longer, _ = step_work(prompts.mask_plan(3))
    # The second frame looks at one memory, the third at two
    assert longer.guessed == 0 and longer.total > 1.5 * found.total


def test_a_frozen_encoder_has_no_backward_pass(whole):
    found, backward = whole
    frozen, _ = step_work(prompts.mask_plan(2), frozen=("image_encoder/*",))
    assert found.total - frozen.total >= backward > 0.1 * found.total
