"""Which implementation of attention is chosen, and what is refused."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sam2_jax.model.kernels import Kernel, Size, choose, described, make_kernel
from sam2_jax.model.sam2 import make_sam2
from sam2_jax.types import UserError

H100 = Kernel("auto", "gpu", (9, 0))
A100 = Kernel("auto", "gpu", (8, 0))
TPU = Kernel("auto", "tpu")
CPU = Kernel("auto", "cpu")


@pytest.mark.parametrize(
    "kernel, head_dim, dtype, dropout, masked, expected",
    [
        (CPU, 256, "float32", False, False, "blockwise"),
        (CPU, 256, "bfloat16", True, True, "blockwise"),
        (H100, 256, "bfloat16", False, False, "cudnn"),
        (H100, 256, "bfloat16", False, True, "blockwise"),
        (H100, 256, "bfloat16", True, False, "blockwise"),
        (H100, 256, "float32", False, False, "blockwise"),
        (A100, 256, "bfloat16", False, False, "blockwise"),
        (A100, 72, "bfloat16", False, False, "cudnn"),
        (TPU, 256, "bfloat16", False, True, "flash"),
        (TPU, 256, "float32", True, False, "blockwise"),
        (CPU._replace(name="xla"), 256, "float32", True, True, "xla"),
        (H100._replace(name="cudnn"), 256, "bfloat16", False, True, "cudnn"),
    ],
)
def test_choice(kernel, head_dim, dtype, dropout, masked, expected):
    assert choose(kernel, head_dim, dtype, dropout, masked) == expected


@pytest.mark.parametrize(
    "kernel, dtype, dropout, words",
    [
        (CPU._replace(name="flash"), "float32", False, "needs a TPU, and this is a CPU"),
        (TPU._replace(name="cudnn"), "bfloat16", False, "needs an NVIDIA GPU, and this is a TPU"),
        (TPU._replace(name="flash"), "bfloat16", True, "model.attention_dropout is not 0"),
        (H100._replace(name="cudnn"), "bfloat16", True, "model.attention_dropout is not 0"),
        (H100._replace(name="cudnn"), "float32", False, "bfloat16, and this is float32"),
        (A100._replace(name="cudnn"), "bfloat16", False, "9.0 for heads of 256, and this is 8.0"),
    ],
)
def test_what_cannot_be_is_refused_by_the_key(kernel, dtype, dropout, words):
    with pytest.raises(UserError, match=f"model.attention={kernel.name} .*{words}"):
        choose(kernel, 256, dtype, dropout)


def test_unknown_name_and_its_nearest():
    with pytest.raises(UserError, match="model.attention='blockwize'.*'blockwise'"):
        make_kernel("blockwize")


def test_device_is_asked_for_its_platform():
    def device(platform, capability):
        return SimpleNamespace(platform=platform, compute_capability=capability)

    assert make_kernel("auto", device("gpu", "9.0")) == H100
    assert make_kernel("xla", device("gpu", "gfx90a")) == Kernel("xla", "gpu", (0, 0))
    assert make_kernel("auto", SimpleNamespace(platform="tpu")) == TPU
    assert make_kernel() == CPU  # the first of the process


def test_description_for_the_table():
    size = Size(4096, 7 * 4096, 256)
    assert described(CPU, size, "float32", False) == "blockwise"
    assert described(H100, size, "bfloat16", False) == "cudnn"
    assert described(H100, size, "bfloat16", True) == "blockwise"
    assert described(H100, size._replace(masked=True), "bfloat16", False) == "blockwise"
    assert described(H100, Size(64, 64, 256), "bfloat16", False) == "xla"
    with pytest.raises(UserError, match="needs a TPU"):
        described(H100._replace(name="flash"), Size(64, 64, 256), "bfloat16", False)


def test_model_hands_its_kernel_to_the_trunk_and_to_memory_attention(monkeypatch):
    monkeypatch.setattr("sam2_jax.model.attention.LARGE", 1)
    model = make_sam2("nano", 64, kernel=CPU._replace(name="flash"))
    v = model.variant
    memory = jnp.zeros((1, 1, 1, 16, v.memory_dim))
    pointer = jnp.zeros((1, 1, 1, v.hidden_dim))
    top = jnp.zeros((1, 4, 4, v.hidden_dim))
    zero, one = jnp.zeros(1, int), jnp.ones((), int)
    calls = {
        "encode_image": (jnp.zeros((1, 64, 64, 3)),),
        "with_memory": (top, memory, zero, pointer, jnp.zeros(1), one, zero, None),
    }
    for method, args in calls.items():
        with pytest.raises(UserError, match="model.attention=flash needs a TPU"):
            jax.eval_shape(functools.partial(model.init, method=method), jax.random.key(0), *args)
