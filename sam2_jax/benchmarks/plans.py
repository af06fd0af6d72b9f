"""Plans by name, as numpy arrays: both sides read them, and the reference's process has no JAX."""

import re
from collections.abc import Sequence

import numpy as np

NAMES = "mask1, mask2, point11, point12, point22, box11, box12 or box22"
MOST = 2  # frames that are prompted, or corrected, in the reference's recipe


def parse(name: str) -> tuple[str, int, int]:
    """(kind, conditioning frames, corrected frames) of a plan's name; ValueError for no plan."""
    match = re.fullmatch(r"(mask)([12])|(point|box)([12])([12])", name)
    if not match:
        raise ValueError(f"'{name}' is no plan: expected {NAMES}")
    mask, masks, kind, cond, corrected = match.groups()
    if mask:
        return mask, int(masks), 0
    if int(corrected) < int(cond):
        raise ValueError(
            f"'{name}' is no plan: every prompted frame is corrected, so expect {NAMES}"
        )
    return kind, int(cond), int(corrected)


def check(names: Sequence[str], frames: int) -> None:
    """Raises ValueError if one of the plans is none for clips of so many frames."""
    for name in names:
        kind, cond, corrected = parse(name)
        if max(cond, corrected) > frames:
            raise ValueError(f"plan '{name}' needs clips of at least {MOST} frames")
        if frames == 1 and kind == "mask":
            raise ValueError(f"plan '{name}' is not for single images, which get points or boxes")


def make(name: str, frames: int, corrections: int) -> dict[str, np.ndarray]:
    """The fields of a `PromptPlan`: prompts on frame 0 and on the middle frame, if on two.

    `corrections` is the number of clicks on a corrected frame, all drawn from the error.
    """
    kind, cond, corrected = parse(name)
    frame = np.arange(frames)
    spread = [0, frames // 2]
    is_cond = np.isin(frame, spread[:cond])
    return {
        "order": np.argsort(np.where(is_cond, frame - frames, frame)).astype(np.int32),
        "use_points": np.array(kind != "mask"),
        "is_cond": is_cond,
        "is_box": is_cond & (kind == "box"),
        "is_corrected": np.isin(frame, spread[:corrected]),
        "from_truth": np.zeros((frames, corrections), bool),
    }
