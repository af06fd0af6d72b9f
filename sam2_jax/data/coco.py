"""Images with instances in COCO's JSON format: polygons or run lengths. Clips of one frame.

Objects of an image are numbered from 1 in the order of the file, those left out not counted:
crowds (one mask for many), empty ones, and those larger than the user wants. Images without
annotations are clips without objects.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools import mask as coco_mask

from sam2_jax.data.file_source import read_file
from sam2_jax.data.lists import choose
from sam2_jax.data.rle import decode_rle, rle_area
from sam2_jax.data.scan import (
    decode_pictures,
    frame_size,
    load_json,
    local_root,
    scan_files,
)
from sam2_jax.data.sources import Faults, Video, bar
from sam2_jax.types import UserError

WHOLE = 1.0  # max_area above this lets every object pass
CORNER = 3  # points; with fewer a polygon has no area, and pycocotools takes two for a box
FAR = 10  # sides of the image; drawing an outline takes memory in proportion to its length
MEND = "export the annotations again, or leave the image out by config.data.exclude"
WANTED = "expected the images that the annotations name"


class Picture(NamedTuple):
    """One image and what of its annotations is kept."""

    video: Video
    objects: int
    packed: bytes  # their segmentations; as Python objects they would take ten times the memory


class CocoSource:
    """Images opened and checked by `open_coco`."""

    def __init__(
        self, name: str, root: Path, pictures: Sequence[Picture], notes: list[str]
    ) -> None:
        """`pictures` lie in `root` and have passed the checks."""
        self.name, self.notes, self._root = name, notes, root
        self._pictures = list(pictures)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._pictures)

    def video(self, index: int) -> Video:
        """Name and size of an image, as a clip of one frame."""
        return self._pictures[index].video

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects, without decoding."""
        return tuple(range(1, self._pictures[index].objects + 1))

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Decode the image, as often as `frames` names its frame 0, and some of the masks.

        Raises:
            UserError: the image or a mask is broken.
        """
        picture = self._pictures[index]
        video = picture.video
        masks = np.zeros((len(frames), len(objects), video.height, video.width), bool)
        kept = json.loads(zlib.decompress(picture.packed)) if objects and frames else []
        for j, k in enumerate(objects):
            if k <= len(kept):
                where = f"{self.name}: object {k} of {video.name}"
                rle = _run_lengths(kept[k - 1], video.height, video.width, where)
                masks[:, j] = decode_rle(rle, video.height, video.width, where)
        return decode_pictures([self._root / video.name for _ in frames], video), masks

    def encoded(self, index: int, frame: int) -> bytes:
        """The image file."""
        return read_file(self._root / self.video(index).name)


def open_coco(
    annotations: str,
    images: str,
    *,
    key: str = "config.data.root",
    max_area: float = 1.1,
    include: str = "",
    exclude: str = "",
    faults: Faults | None = None,
) -> CocoSource:
    """Read the annotations, check them and all images, and open them.

    Args:
        annotations: JSON file of instances.
        images: folder that its file names start from.
        key: how the user named the folder.
        max_area: objects that cover this share of the pixels or more are left out; above 1: none.
        include: text file of the images to take, by file name; empty: all.
        exclude: text file of the images to leave out.
        faults: what to do about broken images.

    Raises:
        UserError: nothing there; the JSON file is broken, or names a file outside the folder; or
            an image is missing, broken or of another size, or an annotation of it is broken.
    """
    faults = faults or Faults()
    root = local_root(images, key, WANTED)
    if not annotations:
        raise UserError(
            f"{key.removesuffix('root')}instances.annotations is empty: give the JSON file of "
            f"instances that belongs to {key}={images}"
        )
    data = load_json(annotations)
    try:
        entries = {int(e["id"]): (str(e["file_name"]), int(e["height"]), int(e["width"]))
                   for e in data["images"]}  # fmt: skip
        by_image = defaultdict(list)
        for a in data["annotations"]:
            by_image[int(a["image_id"])].append(a)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{annotations} lacks what COCO's instances have (images with id, file_name, height "
            f"and width, annotations with image_id; {type(error).__name__} {error}): export it "
            "again"
        ) from error
    del data
    ids = list(entries)
    for name, _, _ in entries.values():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{annotations} has the file name {name}, which leads out of {images}: expected "
                "names relative to that folder"
            )
    if not ids:
        raise UserError(f"{annotations} names no image, expected at least one: export it again")
    if strange := next((i for i in by_image if i not in entries), None):
        raise UserError(
            f"{annotations} annotates image {strange}, which is not in its list of images: export "
            "it again"
        )
    names = [entries[i][0] for i in ids]
    ids = [ids[i] for i in choose(names, include, exclude, annotations)]
    total = len(ids)
    for i in ids:
        if "\0" in entries[i][0]:
            faults.add(
                UserError(
                    f"{annotations} has the file name {entries[i][0]!r}, which no file can have: "
                    f"{MEND}"
                )
            )
    ids = [i for i in ids if "\0" not in entries[i][0]]
    pictures, left = [], {"crowds": 0, "empty": 0, "too large": 0}
    files = [root / entries[i][0] for i in ids]
    sizes = scan_files(files, look_at_image, where=images, quick=True, faults=faults)
    each = bar("checking masks", len(ids), "image", ids)  # all of COCO takes a minute
    for i, size in zip(each, sizes, strict=True):
        name, height, width = entries[i]
        try:
            if isinstance(size, UserError):
                raise size
            if tuple(size) != (height, width):
                raise UserError(
                    f"{root / name} is {size[1]} x {size[0]}, but {annotations} is for {width} x "
                    f"{height}: {MEND}"
                )
            kept = _kept(by_image[i], height, width, max_area, left, annotations)
        except UserError as error:
            faults.add(error)
            continue
        packed = zlib.compress(json.dumps(kept).encode(), 1)
        video = Video(name, 1, height, width)
        pictures.append(Picture(video, len(kept), packed))
    notes = faults.notes(total, annotations)
    if any(left.values()):
        told = ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
        notes.append(f"{sum(left.values()):,} annotations left out: {told}")
    return CocoSource(annotations, root, pictures, notes)


def look_at_image(path: Path) -> list[int]:
    """Height and width of an image; given to `scan_files`.

    Raises:
        UserError: it is missing or broken.
    """
    return list(frame_size(path))


def _kept(
    annotations: list[Any], height: int, width: int, max_area: float, left: dict, where: str
) -> list[Any]:
    """Segmentations of the objects that are kept; counts the others in `left`."""
    kept = []
    for a in annotations:
        told = f"{where}: annotation {a.get('id')}"
        if a.get("iscrowd"):
            left["crowds"] += 1
            continue
        segmentation = a.get("segmentation")
        # All is checked here, so that nothing fails in the middle of training. The file's own field
        # `area` is not asked: it may be missing, and outlines without a pixel have one, too.
        rle = _run_lengths(segmentation, height, width, told)
        if rle is segmentation:
            area = rle_area(rle, height, width, told)
        else:
            area = int(coco_mask.area(rle))
        if area == 0:
            left["empty"] += 1
        elif max_area <= WHOLE and area / (height * width) >= max_area:
            left["too large"] += 1
        else:
            kept.append(segmentation)
    return kept


def _run_lengths(segmentation: Any, height: int, width: int, where: str) -> Any:
    """Polygons drawn; run lengths as they are.

    Raises:
        UserError: neither of the two.
    """
    if isinstance(segmentation, dict):
        return segmentation
    if not isinstance(segmentation, list):
        raise UserError(
            f"{where} has a segmentation of type {type(segmentation).__name__}, expected polygons "
            f"or run lengths: {MEND}"
        )
    polygons = []
    for points in segmentation:
        try:
            points = np.asarray(points, np.float64)
        except (TypeError, ValueError):
            points = np.full(1, np.nan)
        if points.ndim != 1 or points.size % 2 or not np.isfinite(points).all():
            raise UserError(
                f"{where} has a polygon that is no list of x, y, x, y, ... in pixels: {MEND}"
            )
        if points.size and np.abs(points).max() > FAR * max(height, width):
            raise UserError(
                f"{where} has a polygon with a corner at {np.abs(points).max():g}, far outside the "
                f"image of {width} x {height}: {MEND}"
            )
        if points.size >= 2 * CORNER:
            polygons.append(points.tolist())
    if not polygons:
        polygons.append([0.0] * 2 * CORNER)  # an empty mask
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
