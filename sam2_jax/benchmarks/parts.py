"""Which part of the model, and which pass, the work of a step belongs to."""

import re
from collections.abc import Mapping

from sam2_jax import work

# Pattern in a path of scopes -> part; the first that is found
PARTS = (
    (r"memory_attention/.*self_attn", "memory: self-attention"),
    (r"memory_attention/.*cross_attn", "memory: cross-attention"),
    (r"memory_attention/.*linear", "memory: feed-forward"),
    (r"memory_attention", "memory: other"),
    (r"image_encoder|encode_image", "image encoder"),
    (r"memory_encoder|encode_memory", "memory encoder"),
    (r"sam_mask_decoder", "mask decoder"),
    (r"sam_prompt_encoder|mask_downsample", "prompts"),
    (r"", "losses, pointers, resizing"),
)
FORWARD, BACKWARD, AGAIN = "forward", "backward", "again"


def pass_of(path: str) -> str:
    """Forward, backward, or the forward pass done again for the backward one."""
    if "rematted_computation" in path:
        return AGAIN
    return BACKWARD if "transpose(" in path else FORWARD


def by_part(scopes: Mapping[str, work.Work]) -> dict[str, dict[str, float]]:
    """TFLOP by part and pass."""
    found = {part: {FORWARD: 0.0, BACKWARD: 0.0, AGAIN: 0.0} for _, part in PARTS}
    for path, done in scopes.items():
        part = next(part for pattern, part in PARTS if re.search(pattern, path))
        found[part][pass_of(path)] += done.total / 1e12
    return {part: passes for part, passes in found.items() if any(passes.values())}
