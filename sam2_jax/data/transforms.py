"""From a decoded clip to what the model sees: flip, masks of single objects, square resize.

Frames stay uint8; the model normalises them on the device.
"""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

# Loader threads and processes are the parallelism; OpenCV's own pool would fight with them.
cv2.setNumThreads(1)


def resize_frames(frames: UInt8[np.ndarray, "t h w 3"], side: int) -> UInt8[np.ndarray, "t s s 3"]:
    """Resize to a square with the reference's filter: Pillow's bilinear, antialiased.

    Where both sides grow, as 480 lines to 1024, that filter is plain bilinear interpolation,
    and OpenCV's is ten times faster and within one level of it; shrinking is left to Pillow
    itself, since OpenCV's antialiased mode (INTER_AREA) is a different filter.
    """
    _, height, width, _ = frames.shape
    if (height, width) == (side, side):
        return frames
    out = np.empty((len(frames), side, side, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        if height <= side and width <= side:
            cv2.resize(frame, (side, side), dst=target, interpolation=cv2.INTER_LINEAR)
        else:
            image = Image.fromarray(frame)
            target[:] = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    return out


def resize_masks(masks: Bool[np.ndarray, "n h w"], side: int) -> Bool[np.ndarray, "n s s"]:
    """Resize to a square: antialiased bilinear on 0 and 1, kept where more than half is covered.

    So does torchvision with the reference's uint8 masks: it interpolates in float32 and rounds
    half to even, hence exactly a half is background.
    """
    _, height, width = masks.shape
    if (height, width) == (side, side):
        return masks
    out = np.zeros((len(masks), side, side), bool)
    for mask, target in zip(masks, out, strict=True):
        if not mask.any():
            continue
        cover = mask.astype(np.float32)
        if height <= side and width <= side:
            cover = cv2.resize(cover, (side, side), interpolation=cv2.INTER_LINEAR)
        else:
            cover = np.asarray(
                Image.fromarray(cover).resize((side, side), Image.Resampling.BILINEAR)
            )
        target[:] = cover > 0.5
    return out


def flip(
    frames: UInt8[np.ndarray, "t h w 3"], labels: UInt8[np.ndarray, "t h w"]
) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w"]]:
    """Mirror a whole clip left to right."""
    return np.ascontiguousarray(frames[:, :, ::-1]), np.ascontiguousarray(labels[:, :, ::-1])


def object_masks(
    labels: UInt8[np.ndarray, "t h w"], objects: list[int], max_objects: int, side: int
) -> tuple[Bool[np.ndarray, "t o s s"], Bool[np.ndarray, " o"]]:
    """One mask per object and frame, padded with empty objects, and which objects are real.

    An object that is absent from a frame has an empty mask there.
    """
    masks = np.zeros((len(labels), max_objects, side, side), bool)
    for slot, label in enumerate(objects):
        masks[:, slot] = resize_masks(labels == label, side)
    return masks, np.arange(max_objects) < len(objects)
