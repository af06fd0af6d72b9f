"""The step that a config describes: the real model, bfloat16, dropout, its optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from sam2_jax import config as config_lib
from sam2_jax import recipe, rules, sharding, train
from sam2_jax.data import catalogue
from sam2_jax.model.sam2 import init_params, make_sam2

# A mask as prompt reads neither embedding; the frequencies are a buffer.
UNREAD = {"sam_prompt_encoder/gaussian", "no_mem_pos_enc", "no_mem_embed"}
MASK, MASK_AGAIN, CLICK, BOX = 8, 9, 4, 10  # seeds, by what they prompt frame 0 alone with


def test_step_of_a_config_moves_what_it_should():
    c = smoke.get_config()
    c.model.update(resolution=32, version="2.0", attention_dropout=0.1, dropout=0.1, drop_path=0.1)
    c.data.update(num_frames=2, max_objects=2, batch_size=1)
    c.prompts.update(prob_points=0.5, corrections=1)
    c.train.update(precision="bfloat16", remat="none")  # recomputing takes longer to compile
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
        after, metrics = step(copy, batch, jax.random.key(seed))
        return jax.device_get(after.params), float(metrics["loss"])

    (after, loss), (_, again), (_, other) = run(MASK), run(MASK), run(MASK_AGAIN)
    run(CLICK)
    run(BOX)
    assert step._cache_size() == 1  # one program, whatever the plan
    assert np.isfinite(loss) and loss == again
    assert loss != other  # another draw of dropout
    same = jax.tree.map(np.array_equal, jax.device_get(before), after)
    by_path = dict(zip(rules.paths_of(same), jax.tree.leaves(same), strict=True))
    assert all(by_path[path] for path in UNREAD)
    # Every part moves; within one, a mask that is not the best leaves its biases at zero.
    moved = {path.split("/")[0] for path, is_same in by_path.items() if not is_same}
    assert moved == {path.split("/")[0] for path in by_path} - UNREAD
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
