"""Which implementation of attention a model takes, decided by what it will run on."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sam2_jax.rules import nearest
from sam2_jax.types import UserError

NAMES = ("auto", "xla", "blockwise", "cudnn", "flash")
# Logits of one image or object, and head, from which a kernel pays. Below it (windows of the
# trunk, tokens of the mask decoder, all at 256 pixels) attention is XLA's own, whatever was chosen:
# on a CPU blockwise is as fast at 256 queries and 1856 keys, 2 to 4 times as fast at 1024 and 1024.
LARGE = 2**19
FUSED = {"cudnn": "gpu", "flash": "tpu"}  # and the platform each is for
HALF = ("bfloat16", "float16")
AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities


class Kernel(NamedTuple):
    """An implementation by name, and what decides whether it can be had."""

    name: str = "xla"
    platform: str = "cpu"  # of the devices that will run it: cpu, gpu or tpu
    capability: tuple[int, int] = (0, 0)  # of an NVIDIA GPU


XLA = Kernel()


def make_kernel(name: str = "auto", device: Any = None) -> Kernel:
    """The implementation `name` on a `jax.Device`, which may be one that is only compiled for.

    None: the first device of this process.

    Raises:
        UserError: the name is unknown.
    """
    if name not in NAMES:
        raise UserError(
            f"model.attention={name!r} is unknown: did you mean {nearest(str(name), NAMES)!r}? "
            f"(of {', '.join(NAMES)})"
        )
    device = jax.devices()[0] if device is None else device
    parts = str(getattr(device, "compute_capability", "")).split(".")
    known = len(parts) == 2 and all(part.isdigit() for part in parts)
    return Kernel(name, device.platform, (int(parts[0]), int(parts[1])) if known else (0, 0))


def choose(kernel: Kernel, head_dim: int, dtype: Any, dropout: bool, masked: bool = False) -> str:
    """The implementation of a large attention: one of NAMES, never auto.

    `dropout` is on the weights; `masked`: some keys are left out.

    Raises:
        UserError: the one that was asked for by name cannot compute it.
    """
    if kernel.name != "auto":
        if reason := refusal(kernel, head_dim, dtype, dropout):
            raise UserError(f"model.attention={kernel.name} {reason}: take auto")
        return kernel.name
    for name in ("cudnn", "flash"):
        # cuDNN takes a mask as a number for every weight, which is what a kernel is to avoid
        if (name, masked) != ("cudnn", True):
            if not refusal(kernel._replace(name=name), head_dim, dtype, dropout):
                return name
    return "blockwise"


def refusal(kernel: Kernel, head_dim: int, dtype: Any, dropout: bool) -> str:
    """Why `kernel` cannot compute an attention, or ''."""
    if kernel.name not in FUSED:
        return ""
    if kernel.platform != FUSED[kernel.name]:
        what = "an NVIDIA GPU" if kernel.name == "cudnn" else "a TPU"
        return f"needs {what}, and this is a {kernel.platform.upper()}"
    if dropout:
        return "cannot drop attention weights, and model.attention_dropout is not 0"
    if kernel.name == "flash":
        return ""
    least = HOPPER if head_dim > 128 else AMPERE
    if kernel.capability < least:
        found, wanted = (".".join(map(str, x)) for x in (kernel.capability, least))
        return f"needs compute capability {wanted} for heads of {head_dim}, and this is {found}"
    if np.dtype(dtype).name not in HALF:
        return f"computes in bfloat16, and this is {np.dtype(dtype).name} (train.precision)"
    return ""


class Size(NamedTuple):
    """Of one attention."""

    queries: int
    keys: int
    head_dim: int
    masked: bool = False  # some keys are left out


def described(kernel: Kernel, size: Size, dtype: Any, dropout: bool) -> str:
    """What an attention of this size will be. Raises as `choose`, for small ones as well."""
    name = choose(kernel, size.head_dim, dtype, dropout, size.masked)
    return name if size.queries * size.keys >= LARGE else "xla"
