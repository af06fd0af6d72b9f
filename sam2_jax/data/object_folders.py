"""Clips with one folder of masks per object, as the validation and test sets of SA-V.

    JPEGImages/CLIP/*.jpg        Annotations/CLIP/OBJECT/*.png
    JPEGImages_24fps/CLIP/*.jpg  Annotations_6fps/CLIP/OBJECT/*.png   (SA-V: annotated_every=4)

OBJECT is a number from 0, and the object's id is one more. A mask has the name of its frame and is
the object wherever it is not 0; masks of several objects may overlap. Where a PNG is missing the
object is absent, as in the reference (facebookresearch/sam2@2b90b9f
training/dataset/vos_segment_loader.py, MultiplePNGSegmentLoader).
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from sam2_jax.data.checks import check_files
from sam2_jax.data.decode import decode_binary
from sam2_jax.data.file_source import FileSource, decode_file
from sam2_jax.data.files import (
    FRAME_SUFFIXES,
    MASK_SUFFIXES,
    AnyPath,
    Files,
    check_gaps,
    collect,
    image_names,
    is_folder,
    number_key,
    open_root,
    stem,
    subfolders,
)
from sam2_jax.data.lists import choose
from sam2_jax.data.sources import Faults, Video
from sam2_jax.types import UserError

IMAGES, ANNOTATIONS = ("JPEGImages", "JPEGImages_24fps"), ("Annotations", "Annotations_6fps")
WANTED = (
    "expected JPEGImages/CLIP/*.jpg and Annotations/CLIP/OBJECT/*.png, or JPEGImages_24fps and "
    "Annotations_6fps as SA-V has"
)
ENOUGH = 4  # annotated frames at equal distances are no accident


class ObjectFolderSource(FileSource):
    """Clips opened and checked by `open_object_folders`."""

    def __init__(self, name: str, clips: Sequence[tuple[Files, Video]], notes: list[str]) -> None:
        """`clips` have passed the checks; their masks are OBJECT/FRAME.png."""
        super().__init__(name, clips, notes)
        self._masks_at = [_by_frame(files) for files, _ in clips]

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects visible on a frame, ascending. Decodes their masks."""
        ids = sorted(self._masks_at[index][frame])
        return tuple(label for label in ids if self._masks(index, frame, [label]).any())

    def _masks(self, index: int, frame: int, objects: Sequence[int]) -> Bool[np.ndarray, "o h w"]:
        files, video = self._clips[index]
        masks = np.zeros((len(objects), video.height, video.width), bool)
        names = self._masks_at[index][frame]
        for mask, label in zip(masks, objects, strict=True):
            if label in names:
                mask[:] = decode_file(files.mask_dir / names[label], decode_binary, video)
        return masks


def _object_id(name: str) -> int:
    """Id of the object that a mask OBJECT/FRAME.png shows."""
    return int(name.split("/")[0]) + 1


def _by_frame(files: Files) -> list[dict[int, str]]:
    """For each frame of a clip, the mask files of its objects by id."""
    places = {number_key(stem(frame)): place for place, frame in enumerate(files.frames)}
    found: list[dict[int, str]] = [{} for _ in files.frames]
    for name in files.masks:
        found[places[number_key(stem(name))]][_object_id(name)] = name
    return found


def open_object_folders(
    root: str,
    *,
    key: str = "config.data.root",
    include: str = "",
    exclude: str = "",
    sample_rate: int = 1,
    annotated_every: int = 1,
    single_object: bool = False,
    faults: Faults | None = None,
) -> ObjectFolderSource:
    """Find the clips, check every file that is used, and open them.

    Args:
        root: folder in the layout above, local or gs:// or s3://.
        key: how the user named the folder, for messages.
        include: text file with the clips to use, one a line.
        exclude: text file with clips to leave out.
        sample_rate: take every k-th frame only.
        annotated_every: every k-th frame, counted from the first, has masks of the objects that
            are visible; the frames between are left out.
        single_object: every object of every clip becomes a clip of its own, CLIP/OBJECT, and
            keeps its id (`single_object_mode` of the reference's PNGRawDataset).
        faults: what to do about broken clips; by default the first one stops.

    Raises:
        UserError: the folder is missing or of another layout; a list is wrong; a clip lacks frames
            or objects, a mask belongs to no frame that is annotated, masks lie much farther apart
            than `annotated_every`, sizes differ, or a file is broken.
    """
    for name, value in (("sample_rate", sample_rate), ("annotated_every", annotated_every)):
        if value < 1:
            raise UserError(f"{name} of {key}={root} is {value}, expected 1 or more: raise it")
    faults = faults or Faults()
    folder = open_root(root, key, WANTED)
    images, annotations = (
        next((folder / name for name in names if is_folder(folder / name)), None)
        for names in (IMAGES, ANNOTATIONS)
    )
    if images is None or annotations is None:
        there = ", ".join(subfolders(folder)[:5]) or "no folders"
        raise UserError(f"{key}={root} holds {there}: {WANTED}")
    names = subfolders(images)
    if not names:
        raise UserError(f"{images} has no folder of frames (from {key}={root}): {WANTED}")
    names = [names[i] for i in choose(names, include, exclude, str(images))]

    def find(name: str) -> Files:
        return _find_clip(name, images / name, annotations / name, sample_rate, annotated_every)

    clips = check_files(collect(names, find, faults), faults)
    if single_object:
        clips = [one for clip in clips for one in _one_object_each(*clip)]
    return ObjectFolderSource(str(root), clips, faults.notes(len(names), str(root)))


def _one_object_each(files: Files, video: Video) -> list[tuple[Files, Video]]:
    by_object: dict[str, list[str]] = {}
    for name in files.masks:
        by_object.setdefault(name.split("/")[0], []).append(name)
    return [
        (files._replace(masks=masks), video._replace(name=f"{video.name}/{folder}"))
        for folder, masks in sorted(by_object.items())
    ]


def _find_clip(
    name: str, frame_dir: AnyPath, mask_dir: AnyPath, sample_rate: int, annotated_every: int
) -> Files:
    """Frames of one clip that are used, and the masks of all objects on them."""
    frames = image_names(frame_dir, FRAME_SUFFIXES)
    if not frames:
        raise UserError(f"clip {name} has no frames: {frame_dir} has no pictures; add them")
    check_gaps(name, frame_dir, frames)
    places = {number_key(stem(frame)): place for place, frame in enumerate(frames)}
    objects = subfolders(mask_dir)
    if strange := [o for o in objects if not o.isdecimal()]:
        raise UserError(
            f"{mask_dir / strange[0]} is no folder of an object, expected a number as its name "
            "(000 for the first object): rename it"
        )
    if len({int(o) for o in objects}) < len(objects):
        raise UserError(f"{mask_dir} has two folders of one number: rename one of them")
    masks = {f"{o}/{m}" for o in objects for m in image_names(mask_dir / o, MASK_SUFFIXES)}
    if not masks:
        flat = " but not in folders per object" if image_names(mask_dir, MASK_SUFFIXES) else ""
        raise UserError(
            f"clip {name} has no masks in {mask_dir}{flat}: expected OBJECT/FRAME.png; add them, "
            "or take the clip out"
        )
    if strays := sorted(m for m in masks if number_key(stem(m)) not in places):
        raise UserError(
            f"{mask_dir / strays[0]} has no frame of its name in {frame_dir}: add it, or remove "
            "the mask"
        )
    _check_spacing(name, mask_dir, {places[number_key(stem(m))] for m in masks}, annotated_every)
    step = math.lcm(sample_rate, annotated_every)
    used = [m for m in sorted(masks) if places[number_key(stem(m))] % step == 0]
    return Files(name, frame_dir, frames[::step], mask_dir, used)


def _check_spacing(name: str, mask_dir: AnyPath, places: set[int], annotated_every: int) -> None:
    """Do masks lie where `annotated_every` says? Else objects would seem absent in between."""
    spacing = math.gcd(*places)
    if spacing % annotated_every:
        raise UserError(
            f"clip {name} has masks in {mask_dir} on frames that are not one in {annotated_every} "
            f"counted from the first: set folder.annotated_every to {spacing}"
        )
    if spacing > annotated_every and len(places) >= ENOUGH:
        raise UserError(
            f"clip {name} has masks in {mask_dir} on one frame in {spacing} only, and with "
            f"folder.annotated_every={annotated_every} its objects would be absent on the others: "
            f"set that to {spacing}"
        )
