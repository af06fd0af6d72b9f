"""Resizing to what the model sees. Frames stay uint8; the model normalises them on the device."""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

# Loader threads and processes are the parallelism; OpenCV's own pool would fight with them.
cv2.setNumThreads(1)

Colour = tuple[int, int, int]


def resize_frame(frame: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h1 w1 3"]) -> None:
    """Resize into `target` with the reference's filter: Pillow's bilinear, antialiased.

    Where no side shrinks, as from 480 lines to 1024, that filter is plain bilinear interpolation,
    and OpenCV's is eight times faster and within one level of it. Shrinking is left to Pillow
    itself: OpenCV's antialiased mode (INTER_AREA) is a different filter.
    """
    height, width = target.shape[:2]
    if frame.shape == target.shape:
        target[:] = frame
    elif frame.shape[0] <= height and frame.shape[1] <= width:
        cv2.resize(frame, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    else:
        image = Image.fromarray(frame)
        target[:] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: Bool[np.ndarray, "h w"], target: Bool[np.ndarray, "h1 w1"]) -> None:
    """Resize into `target`: antialiased bilinear on 0 and 1, kept where over half is covered.

    So does torchvision with the reference's uint8 masks: it interpolates in float32 and rounds
    half to even, hence exactly a half is background.
    """
    height, width = target.shape
    if mask.shape == target.shape:
        target[:] = mask
        return
    if not mask.any():
        target[:] = False
        return
    cover = mask.astype(np.float32)
    if mask.shape[0] <= height and mask.shape[1] <= width:
        cover = cv2.resize(cover, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        image = Image.fromarray(cover)
        cover = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    np.greater(cover, 0.5, out=target)


def resize_frames(frames: UInt8[np.ndarray, "t h w 3"], side: int) -> UInt8[np.ndarray, "t s s 3"]:
    """Resize to a square, whatever the aspect; as in `resize_frame`. May return its argument."""
    if frames.shape[1:3] == (side, side):
        return frames
    out = np.empty((len(frames), side, side, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        resize_frame(frame, target)
    return out


def resize_masks(masks: Bool[np.ndarray, "n h w"], side: int) -> Bool[np.ndarray, "n s s"]:
    """Resize to a square, whatever the aspect; as in `resize_mask`. May return its argument."""
    if masks.shape[1:] == (side, side):
        return masks
    out = np.empty((len(masks), side, side), bool)
    for mask, target in zip(masks, out, strict=True):
        resize_mask(mask, target)
    return out


def fitted_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width, pixels, when the longer of both becomes `side`."""
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def pad_frames(
    frames: UInt8[np.ndarray, "t h w 3"], side: int, fill: Colour
) -> UInt8[np.ndarray, "t s s 3"]:
    """Pad to a square at the right and at the bottom with a colour. May return its argument."""
    _, height, width, _ = frames.shape
    if (height, width) == (side, side):
        return frames
    out = np.empty((len(frames), side, side, 3), np.uint8)
    out[:, :height, :width] = frames
    out[:, height:] = out[:, :height, width:] = fill
    return out


def pad_masks(masks: Bool[np.ndarray, "t o h w"], side: int) -> Bool[np.ndarray, "t o s s"]:
    """Pad to a square at the right and at the bottom with background. May return its argument."""
    _, _, height, width = masks.shape
    if (height, width) == (side, side):
        return masks
    return np.pad(masks, ((0, 0), (0, 0), (0, side - height), (0, side - width)))


def resize_clip(
    frames: UInt8[np.ndarray, "t h w 3"], masks: Bool[np.ndarray, "t o h w"], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "t h1 w1 3"], Bool[np.ndarray, "t o h1 w1"]]:
    """Resize frames and masks to `size`, height and width in pixels. May return its arguments."""
    if frames.shape[1:3] == size:
        return frames, masks
    images = np.empty((len(frames), *size, 3), np.uint8)
    covers = np.empty((*masks.shape[:2], *size), bool)
    for frame, image in zip(frames, images, strict=True):
        resize_frame(frame, image)
    for clip, targets in zip(masks, covers, strict=True):
        for mask, target in zip(clip, targets, strict=True):
            resize_mask(mask, target)
    return images, covers
