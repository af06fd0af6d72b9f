"""A run compiles its step once for every shape of batch, whatever the plan, and nothing else.

Nor does its step fetch or send anything that the loop does not hand over.
"""

import contextlib
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import loop
from sam2_jax.types import Batch
from tests.test_train import ALONE, example, sample_plan, setup

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[int]]:
    """A list whose last number grows with every program that is compiled."""
    programs = [0]

    def listen(event, duration_secs, **kwargs):
        del duration_secs, kwargs
        if event == COMPILED:
            programs[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


SETTINGS = loop.LoopSettings(steps=10, log_every=1, eval_every=0, save_every=5)
HOOKS = loop.Hooks(save=lambda step, state: None)


def test_one_program_for_every_shape_of_batch(tmp_path):
    state, step, _ = setup(ALONE)

    def batches():
        for n in itertools.count():
            programs.append(0)
            batch = example(n)
            # In turn: two objects, one
            yield Batch(batch.images, batch.masks[:, :, : 1 + n % 2], batch.valid[:, : 1 + n % 2])

    plans = {bool(sample_plan(jax.random.key(n)).use_points) for n in range(8)}
    assert plans == {False, True}
    key = jax.random.key(0)
    with compilations() as programs:  # before the first batch, then with each
        loop.run_loop(state, step, batches(), key, SETTINGS, ALONE, workdir=tmp_path, hooks=HOOKS)
    assert step._cache_size() == 2
    assert programs[1] and programs[2]
    assert not any(programs[3:])


def test_a_step_that_sends_something_unseen_ends_the_run(tmp_path):
    state, step, _ = setup(ALONE)
    calls = []

    def leaky(state, batch, key):
        calls.append(batch.masks.shape)
        state, metrics = step(state, batch, key)
        # An operand that is on the host goes to the device, at every step
        return state, metrics | {"more": jnp.add(metrics["loss"], np.float32(1))}

    key, batches = jax.random.key(0), map(example, itertools.count())
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop.run_loop(state, leaky, batches, key, SETTINGS, ALONE, workdir=tmp_path, hooks=HOOKS)
    assert len(calls) == 2  # the first one compiles, which may
