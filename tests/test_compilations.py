"""A run compiles its step once for every shape of batch, whatever the plan, and nothing else."""

import itertools

import jax

from sam2_jax import loop
from sam2_jax.types import Batch
from tests.test_train import ALONE, example, sample_plan, setup

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_one_program_for_every_shape_of_batch(tmp_path):
    state, step, _ = setup(ALONE)
    programs = [0]  # compiled before the first batch, then with each

    def listen(event, duration_secs, **kwargs):
        del duration_secs, kwargs
        if event == COMPILED:
            programs[-1] += 1

    def batches():
        for n in itertools.count():
            programs.append(0)
            batch = example(n)
            # In turn: two objects, one
            yield Batch(batch.images, batch.masks[:, :, : 1 + n % 2], batch.valid[:, : 1 + n % 2])

    plans = {bool(sample_plan(jax.random.key(n)).use_points) for n in range(8)}
    assert plans == {False, True}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        settings = loop.LoopSettings(steps=10, log_every=1, eval_every=0, save_every=5)
        hooks = loop.Hooks(save=lambda step, state: None)
        key = jax.random.key(0)
        loop.run_loop(state, step, batches(), key, settings, ALONE, workdir=tmp_path, hooks=hooks)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert step._cache_size() == 2
    assert programs[1] and programs[2]
    assert not any(programs[3:])
