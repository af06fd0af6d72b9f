"""What each implementation of attention takes on a device that is not there.

    python -m tests.attentions --topology=v5e:1x1
    python -m tests.attentions --topology=h100:1

Compiles forward and backward pass of the two largest attentions that have a choice, at 1024 pixels
in bfloat16, and prints a Markdown table: MiB of temporary memory and, of TPUs, the million cycles
that the compiler estimates, without those of kernels. Needs the compiler: the extras tpu or cuda.
Seconds each.
"""

import argparse
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # a device that is here is not asked for anything

import jax
import jax.numpy as jnp

from sam2_jax import hlo, topology
from sam2_jax.model.attention import attention
from sam2_jax.model.kernels import NAMES, make_kernel, refusal
from sam2_jax.products import multiplying

DTYPE = "bfloat16"
# Images or objects, tokens, heads, channels of a head
SIZES = {"trunk of base_plus, 8 frames": (8, 4096, 8, 56), "memory, itself": (3, 4096, 1, 256)}


def compile_one(name: str, size: tuple[int, int, int, int], target: topology.Target) -> Any:
    """The gradient of one attention, compiled for one device of a machine."""
    device = target.devices[0]
    kernel = make_kernel(name, device)
    where = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct(size, DTYPE, sharding=where)

    def loss(query: Any, key: Any, value: Any) -> Any:
        return attention(query, key, value, kernel=kernel)[0].astype(jnp.float32).sum()

    with multiplying(DTYPE), topology.answering_for(device):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
    return lowered.compile(compiler_options=target.options or None)


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--topology", default="v5e:1x1", help="as of scripts/compile_report.py")
    target = topology.open_target(parser.parse_args().topology)
    jax.config.update("jax_enable_compilation_cache", False)  # cannot be read back without one
    print("| attention | form | MiB | million cycles |")
    print("| --- | --- | ---: | ---: |")
    for what, size in SIZES.items():
        for name in NAMES[1:]:  # all but auto
            if refusal(make_kernel(name, target.devices[0]), size[-1], DTYPE, dropout=False):
                continue
            compiled = compile_one(name, size, target)
            mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
            cycles = hlo.totals(compiled.as_text()).cycles / 1e6 if target.clock else None
            estimate = "-" if cycles is None else f"{cycles:.1f}"
            print(f"| {what} | {name} | {mib:.0f} | {estimate} |", flush=True)


if __name__ == "__main__":
    main()
