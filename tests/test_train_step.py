"""The step that a config describes: the real model, bfloat16, dropout, its optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from sam2_jax import config as config_lib
from sam2_jax import prompts, recipe, rules, sharding, train
from sam2_jax.data import catalogue
from sam2_jax.model.sam2 import init_params, make_sam2
from tests.test_compilations import compilations

# A mask as prompt reads neither embedding; the frequencies are a buffer.
UNREAD = {"sam_prompt_encoder/gaussian", "no_mem_pos_enc", "no_mem_embed"}
MASK, MASK_AGAIN = 8, 9  # seeds that draw the same plan
# Plans by their names in benchmarks/plans.py, and seeds that draw them
SEEDS = {"mask1": MASK, "mask2": 5, "point11": 4, "point12": 33, "point22": 11}
SEEDS |= {"box11": 10, "box22": 38}


def plan_of(seed, settings, frames):
    """Name of the plan that the first step of a run with this seed draws."""
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
    plan = prompts.sample_plan(key, frames, settings)
    if not plan.use_points:
        return f"mask{plan.is_cond.sum()}"
    kind = {0: "point", int(plan.is_cond.sum()): "box"}[int(plan.is_box.sum())]
    return f"{kind}{plan.is_cond.sum()}{plan.is_corrected.sum()}"


def test_step_of_a_config_moves_what_it_should():
    c = smoke.get_config()
    c.model.update(resolution=32, version="2.0", attention_dropout=0.1, dropout=0.1, drop_path=0.1)
    c.data.update(num_frames=2, max_objects=2, batch_size=1)
    c.prompts.update(prob_points=0.5, corrections=1, max_cond_frames=2, max_corrected_frames=2)
    c.train.update(precision="bfloat16", remat="frame")
    c = config_lib.finish(c)
    model = make_sam2("nano", 32, "2.0", 0.1, 0.1, 0.1)
    before = init_params(model, jax.random.key(0))
    optimizer, _ = recipe.make_config_optimizer(c, before)
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    state = train.init_state(before, optimizer)
    shapes = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), before)
    state = jax.device_put(state, train.state_shardings(shapes, mesh))
    step = train.jit_step(recipe.make_config_step(c, model, optimizer, mesh), shapes, mesh)
    batch = next(catalogue.make_train_loader(c, catalogue.make_parts(c)))
    batch = sharding.put_batch(batch, mesh)

    def run(seed):
        copy = jax.tree.map(jnp.copy, state)  # the step takes its input's memory
        key = jax.random.key(seed)
        with compilations() as programs:
            after, metrics = step(copy, batch, key)
        return jax.device_get(after.params), float(metrics["loss"]), programs[0]

    settings = prompts.PromptSettings(**c.prompts)
    assert plan_of(MASK_AGAIN, settings, 2) == "mask1"
    assert {plan_of(seed, settings, 2): seed for seed in SEEDS.values()} == SEEDS
    (after, loss, first), (_, again, _), (_, other, _) = run(MASK), run(MASK), run(MASK_AGAIN)
    found = {name: run(seed)[1:] for name, seed in SEEDS.items()}
    # One program, whatever the plan
    assert step._cache_size() == first == 1
    assert all(compiled == 0 and np.isfinite(x) for x, compiled in found.values())
    assert np.isfinite(loss) and loss == again
    assert loss != other  # another draw of dropout
    same = jax.tree.map(np.array_equal, jax.device_get(before), after)
    by_path = dict(zip(rules.paths_of(same), jax.tree.leaves(same), strict=True))
    assert all(by_path[path] for path in UNREAD)
    # Every part moves; within one, a mask that is not the best leaves its biases at zero.
    moved = {path.split("/")[0] for path, is_same in by_path.items() if not is_same}
    assert moved == {path.split("/")[0] for path in by_path} - UNREAD
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
