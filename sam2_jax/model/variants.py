"""The sizes of SAM 2 and what differs between them.

Source: facebookresearch/sam2@2b90b9f configs/sam2.1/*.yaml; `nano` is ours, for a CPU.
"""

import difflib
from typing import NamedTuple

from sam2_jax.types import UserError


class Variant(NamedTuple):
    """Dimensions of one size."""

    embed_dim: int  # channels of the trunk's first stage; doubled at every stage
    num_heads: int  # heads of the first stage; doubled at every stage
    stages: tuple[int, ...]  # blocks per stage
    global_blocks: tuple[int, ...]  # blocks that attend to the whole image
    window_spec: tuple[int, ...] = (8, 4, 14, 7)  # window side per stage, in tokens
    background: int = 7  # side of the position embedding's background grid
    hidden_dim: int = 256
    memory_dim: int = 64
    memory_layers: int = 4
    feedforward_dim: int = 2048  # memory attention
    decoder_mlp_dim: int = 2048  # two-way transformer


VARIANTS = {
    "nano": Variant(
        embed_dim=24,
        num_heads=1,
        stages=(1, 1, 2, 1),
        global_blocks=(3,),  # never the first of a stage, which the reference cannot do
        window_spec=(8, 4, 8, 4),
        hidden_dim=64,
        memory_dim=32,
        memory_layers=2,
        feedforward_dim=256,
        decoder_mlp_dim=256,
    ),
    "tiny": Variant(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": Variant(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base_plus": Variant(112, 2, (2, 3, 16, 3), (12, 16, 20), background=14),
    "large": Variant(144, 2, (2, 6, 36, 4), (23, 33, 43), window_spec=(8, 4, 16, 8)),
}


def variant(name: str) -> Variant:
    """The dimensions called `name`; UserError with the nearest name where there are none."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"model.variant {name!r} is unknown: did you mean {near!r}? "
            f"The variants are {', '.join(VARIANTS)}."
        )
    return VARIANTS[name]
