"""Machines that are not there: what JAX's own checks are told of them."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from sam2_jax import compiled, recipe, topology, train
from sam2_jax.model import fused
from tests.offline import without_compilation_cache  # noqa: F401

CUDA = any(map(importlib.util.find_spec, topology.CUDA_PLUGINS))
BOTH = CUDA and importlib.util.find_spec("nvidia")


def gpu(capability):
    return SimpleNamespace(compute_capability=capability)


def test_cudnn_s_checks_are_answered_for_the_target():
    shape = jax.ShapeDtypeStruct((1, 64, 1, 256), "bfloat16")
    args = shape, shape, shape, 0, 91000, False, True  # layout: batch, tokens, heads, channels
    with topology.answering_for(gpu("9.0")):
        cudnn.check_is_flash_attention(*args)
    for device in (gpu("8.0"), SimpleNamespace()):
        with topology.answering_for(device), pytest.raises(NotImplementedError, match="128"):
            cudnn.check_is_flash_attention(*args)


def test_the_step_is_traced_with_these_answers(monkeypatch):
    asked = []

    def lower(*_):
        asked.append(cudnn.check_compute_capability("9.0"))
        return SimpleNamespace(compile=lambda compiler_options: None)

    for module, name in ((recipe, "make_config_step"), (compiled, "batch_shapes")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(compiled, "heaviest_source", lambda _: ("", SimpleNamespace(batch_size=1)))
    monkeypatch.setattr(train, "jit_step", lambda *_: SimpleNamespace(lower=lower))
    target = topology.Target("h100:1", "cuda", [gpu("9.0")], None, None, {})
    nothing: Any = None
    compiled.compile_step(nothing, compiled.Parts(*[nothing] * 4), target)
    assert asked == [True]


@pytest.mark.usefixtures("without_compilation_cache")
@pytest.mark.skipif(not BOTH, reason="the compiler for NVIDIA GPUs is not installed")
@pytest.mark.parametrize(("heads", "d", "dv"), [(1, 256, 64), (8, 56, 56)])
def test_heads_of_memory_attention_compile_for_h100(heads, d, dv):
    target = topology.open_target("h100:1")
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    shapes = [
        jax.ShapeDtypeStruct((2, n, heads, c), "bfloat16", sharding=where)
        for n, c in ((256, d), (512, d), (512, dv))
    ]

    def loss(query, key, value):
        return fused.cudnn(query, key, value, None).astype(jnp.float32).sum()

    with topology.answering_for(target.devices[0]):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes)
    assert "fmha" in (lowered.compile(compiler_options=target.options).as_text() or "")
