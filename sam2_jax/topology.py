"""Hardware that is not there, by name: what to compile a step for, and how much memory it has.

TPUs come from libtpu's own descriptions of slices, GPUs from a description that XLA takes in place
of a device, CPUs are forced devices of this process.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

from sam2_jax.rules import nearest
from sam2_jax.types import UserError

GPUS_PER_HOST = 8
MOST_GPUS = 64
MOST_CPUS = 64
SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# Each TPU: bytes that programs may use, as the compiler says when they do not suffice; cycles a
# second, of which the published operations a second follow; slices that are sold (others, as the
# compiler has them, are taken too)
TPUS = {
    "v5e": (int(15.75 * 2**30), 1.5e9, SLICES),
    "v5p": (int(95.74 * 2**30), 1.75e9, CUBES),
    "v6e": (int(31.25 * 2**30), 1.75e9, SLICES),
}
# XLA's GpuTargetConfigProto. Common to both GPUs:
_GPU = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 "
    "block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
    "thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 "
)
# Bytes of memory, name, the rest: NVIDIA's figures for the 80 GB SXM forms
GPUS = {
    "h100": (
        84_942_979_072,
        "NVIDIA H100 80GB HBM3",
        "shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
        "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } ",
    ),
    "a100": (
        85_100_068_864,
        "NVIDIA A100-SXM4-80GB",
        "shared_memory_per_core: 167936 core_count: 108 fpus_per_core: 64 "
        "memory_bandwidth: 2039040000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 "
        "shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 } ",
    ),
}
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What JAX raises where a compiler's package is broken or of another version
UNDESCRIBED = (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError)
# What the driver, NCCL and libraries take of a GPU beside XLA's buffers
GPU_RESERVE = 0.05
# Without a device XLA cannot try kernels out: products go to cuBLAS, as they mostly do after
# trials, since its own Triton kernels refuse some shapes that only trials would have shown.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Target(NamedTuple):
    """A machine to compile for."""

    name: str
    platform: str  # cpu, cuda, tpu: as lowering knows them
    devices: Sequence[Any]
    hbm_bytes: int | None  # of a device; None: not known, as of a CPU
    usable_bytes: int | None  # of these for programs and their data
    options: dict[str, Any]  # for the compiler
    clock: float | None = None  # cycles a second, where the compiler estimates cycles

    @property
    def kind(self) -> str:
        return self.devices[0].device_kind


def names() -> str:
    """What `open_target` takes, in words."""
    slices = "; ".join(f"{name}:{', '.join(found)}" for name, (*_, found) in TPUS.items())
    gpus = ", ".join(f"{name}:N" for name in GPUS)
    return (
        f"{slices}; {gpus} with N of 1 to {GPUS_PER_HOST}, or a multiple of {GPUS_PER_HOST} up to "
        f"{MOST_GPUS}; cpu:N with N of 1 to {MOST_CPUS}"
    )


def open_target(name: str) -> Target:
    """The machine that a name such as v5e:4x4, h100:8 or cpu:8 means.

    Raises:
        UserError: no such machine; or the compiler for it is not installed.
    """
    family, _, size = name.partition(":")
    if family in TPUS:
        return _tpu(name, family, size)
    if family in GPUS:
        return _gpu(name, family, _count(name, size, MOST_GPUS, GPUS_PER_HOST))
    if family == "cpu":
        return _cpu(name, _count(name, size, MOST_CPUS))
    known = [*TPUS, *GPUS, "cpu"]
    raise UserError(
        f"--topology={name}: '{family}' is unknown, did you mean '{nearest(family, known)}'? "
        f"There are {names()}"
    )


@contextlib.contextmanager
def answering_for(device: Any) -> Iterator[None]:
    """Within it JAX traces cuDNN's attention as for `device`, which need not be there.

    JAX asks the first device of this process what it can do, which on a machine that only compiles
    is a CPU: it would refuse heads of more than 128. Other devices than GPUs change nothing.
    """
    found = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", found):
        yield
        return
    # Private, hence only where it is needed: training imports this module
    from jax._src.cudnn import fused_attention_stablehlo

    def version(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    answers = {
        "check_compute_capability": lambda least: version(found) >= version(least),
        "is_cuda_compute_capability_equal": lambda other: version(found) == version(other),
    }
    with mock.patch.multiple(fused_attention_stablehlo, **answers):
        yield


def _count(name: str, size: str, most: int, host: int = 0) -> int:
    count = int(size) if size.isascii() and size.isdecimal() else 0
    if not 1 <= count <= most or (host and count > host and count % host):
        raise UserError(
            f"--topology={name}: there is no machine of '{size}' devices; there are {names()}"
        )
    return count


def _tpu(name: str, family: str, size: str) -> Target:
    hbm, clock, slices = TPUS[family]
    sides, largest = _sides(size), _sides(slices[-1])
    wrong = UserError(
        f"--topology={name}: there is no slice '{size}' of {family}; there are "
        f"{', '.join(slices)}, and others of {len(largest)} such numbers, up to as many chips"
    )
    if len(sides) != len(largest) or math.prod(sides) > math.prod(largest):
        raise wrong
    _needs("libtpu", name, "tpu")
    # Else libtpu asks Google's metadata server about a TPU here, for minutes
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # Nor is there a TPU here that only one process may have
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Hosts have four chips; libtpu must be told of a slice that is one chip alone
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except UNDESCRIBED as e:
        if "INVALID_ARGUMENT" in str(e):
            raise wrong from e
        raise _unusable("libtpu", name, "tpu", e) from e
    return Target(name, "tpu", topology.devices, hbm, hbm, {}, clock)


def _gpu(name: str, family: str, count: int) -> Target:
    plugin = next(filter(importlib.util.find_spec, CUDA_PLUGINS), CUDA_PLUGINS[0])
    _needs(plugin, name, "cuda")
    hbm, description, rest = GPUS[family]
    config = (
        f"gpu_device_info {{ {_GPU}{rest}device_memory_size: {hbm} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
        f'device_description_str: "{description}"'
    )
    hosts = max(1, count // GPUS_PER_HOST)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=family,
            topology=f"1x{hosts}x{count // hosts}",
            target_config=config,
        )
    except UNDESCRIBED as e:
        raise _unusable(plugin, name, "cuda", e) from e
    usable = int(hbm * (1 - GPU_RESERVE))
    return Target(name, "cuda", topology.devices, hbm, usable, GPU_OPTIONS)


def _cpu(name: str, count: int) -> Target:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as e:  # the devices of this process exist already
        if len(jax.devices("cpu")) < count:
            raise UserError(
                f"--topology={name}: this process has {len(jax.devices('cpu'))} devices already"
            ) from e
    return Target(name, "cpu", jax.devices("cpu")[:count], None, None, {})


def _sides(size: str) -> list[int]:
    """'2x2x4' to [2, 2, 4]; [] for what is no such text."""
    match = re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)+", size)
    return [int(side) for side in size.split("x")] if match else []


def _needs(module: str, name: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--topology={name} needs the compiler for it, which is not installed: "
            f"{_get(module, extra)}"
        )


def _unusable(module: str, name: str, extra: str, error: Exception) -> UserError:
    return UserError(
        f"--topology={name}: {module} is installed, but cannot describe it ({error!r}); perhaps it "
        f"does not suit this JAX: {_get(module, extra)}"
    )


def _get(module: str, extra: str) -> str:
    version = module.removeprefix("jax_").removesuffix("_plugin")  # cuda12, cuda13
    return (
        f"pip install 'jax[{version if extra == 'cuda' else extra}]', or this package's extra: "
        f"pip install -e '.[{extra}]'"
    )
