"""Four copies of a clip side by side, one of them with the objects to follow.

The model must then tell an object from three others that look the same
(facebookresearch/sam2@2b90b9f training/dataset/transforms.py, RandomMosaicVideoAPI; SAM 2 paper,
appendix D.2).
"""

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.transforms import resize_clip

GRID = 2  # rows and columns


def mosaic(
    frames: UInt8[np.ndarray, "t h w 3"],
    masks: Bool[np.ndarray, "t o h w"],
    target: int,
    mirrored: Bool[np.ndarray, " cells"],
) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
    """Tile a clip 2 x 2, shrunk with the antialiased bilinear filter.

    Args:
        frames: RGB, 0-255.
        masks: of the objects; the same objects in the other three cells count as background.
        target: the cell, 0 to 3 in reading order, whose objects are kept.
        mirrored: which cells are flipped left to right.
    """
    _, height, width, _ = frames.shape
    rows = [r * height // GRID for r in range(GRID + 1)]
    columns = [c * width // GRID for c in range(GRID + 1)]
    images, kept = np.empty_like(frames), np.zeros_like(masks)
    sizes = {}  # cells of an odd number of pixels differ
    for cell in range(GRID * GRID):
        r, c = divmod(cell, GRID)
        top, bottom, left, right = rows[r], rows[r + 1], columns[c], columns[c + 1]
        size = bottom - top, right - left
        if size not in sizes:
            sizes[size] = resize_clip(frames, masks, size)
        small, cover = sizes[size]
        step = -1 if mirrored[cell] else 1
        images[:, top:bottom, left:right] = small[:, :, ::step]
        if cell == target:
            kept[:, :, top:bottom, left:right] = cover[..., ::step]
    return images, kept
