"""Work of the reference's training step, counted by PyTorch without running it."""
# pyright: reportMissingImports=false

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sam2_jax.benchmarks import reference


@contextlib.contextmanager
def shapes_alone(side: reference.Side) -> Iterator[Any]:
    """Within it tensors have no values; parameters and tables of the side become such, for good."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in side.model.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for name, x in list(store.items()):
                if isinstance(x, torch.nn.Parameter):
                    store[name] = torch.nn.Parameter(mode.from_tensor(x.detach()), x.requires_grad)
                elif isinstance(x, torch.Tensor):
                    store[name] = mode.from_tensor(x)
    with mode:
        yield mode


def count(
    variant: Mapping[str, Any],
    sizes: tuple[int, int, int, int],
    plans: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, int]]:
    """Operations of its step by plan: of the forward pass, and whole.

    `sizes` are videos, frames, objects and the resolution in pixels.

    Counted by PyTorch's FlopCounterMode over tensors without values, with attention as the
    products that it is: two forward and four backward. (PyTorch's fused kernels recompute one in
    the backward pass, and the CPU's would not be counted at all.)
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    b, t, o, resolution = sizes
    side = reference.make_side(variant, resolution)
    found = {}
    with shapes_alone(side), sdpa_kernel(SDPBackend.MATH):
        images = np.zeros((b, t, 1, 1, 3), np.uint8)
        masks = np.zeros((b, t, o, 1, 1), bool)
        clips = reference.datapoint(images, masks)
        clips.img_batch = torch.empty(t, b, 3, resolution, resolution)
        clips.masks = torch.empty(t, b * o, resolution, resolution, dtype=torch.bool)
        for name, plan in plans.items():
            with FlopCounterMode(display=False) as once:
                loss = reference.forward(side, clips, plan)
            with FlopCounterMode(display=False) as again:
                loss.backward()
            first = once.get_total_flops()
            found[name] = {"forward": first, "whole": first + again.get_total_flops()}
            side.optimizer.zero_grad(set_to_none=True)
    return found
