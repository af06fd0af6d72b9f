"""Single pictures with masks beside them, each a clip of one frame.

    images/NAME.jpg       masks/NAME.png                one file for all objects
    images/NAME.jpg       masks/NAME/*.png              one file for each object; they may overlap
    JPEGImages/NAME.jpg   SegmentationObject/NAME.png   Pascal VOC

Pictures may be of any kind that `decode.decode_frame` reads. One file for all objects is read as
`decode.decode_labels` says: indexed or 16-bit PNG with ids, or black and white for one object. In
one file for each object everything but 0 is the object, and ids count the files from 1 by name.

Only in Pascal VOC, known by its folders, index 255 is no object but the uncertain border around
one, and pictures without a mask are left out: most of them are for other tasks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from sam2_jax.data.checks import check_files
from sam2_jax.data.decode import decode_binary, decode_labels, masks_of, visible_ids
from sam2_jax.data.file_source import FileSource, decode_file
from sam2_jax.data.files import (
    FRAME_SUFFIXES,
    MASK_SUFFIXES,
    AnyPath,
    Files,
    collect,
    image_names,
    is_folder,
    open_root,
    stem,
    subfolders,
)
from sam2_jax.data.lists import choose
from sam2_jax.data.sources import Faults, Video
from sam2_jax.types import UserError, listed

LAYOUTS = (("images", "masks"), ("JPEGImages", "SegmentationObject"))
VOC = LAYOUTS[1]
VOID = 255
WANTED = (
    "expected images/ and masks/ (masks/NAME.png, or masks/NAME/*.png for one file per object), or "
    "JPEGImages/ and SegmentationObject/ as Pascal VOC has"
)


class PictureSource(FileSource):
    """Pictures opened and checked by `open_pictures`."""

    def __init__(
        self, name: str, clips: Sequence[tuple[Files, Video]], notes: list[str], voc: bool
    ) -> None:
        """`clips` have passed the checks; `voc`: index 255 is background."""
        super().__init__(name, clips, notes)
        self._voc = voc

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects that are visible, ascending."""
        files, _ = self._clips[index]
        if _is_label_map(files):
            return visible_ids(self._labels(index))
        ids = range(1, len(files.masks) + 1)
        return tuple(label for label in ids if self._masks(index, frame, [label]).any())

    def _masks(self, index: int, frame: int, objects: Sequence[int]) -> Bool[np.ndarray, "o h w"]:
        files, video = self._clips[index]
        if _is_label_map(files):
            return masks_of(self._labels(index), objects)
        masks = np.zeros((len(objects), video.height, video.width), bool)
        for mask, label in zip(masks, objects, strict=True):
            if 1 <= label <= len(files.masks):
                path = files.mask_dir / files.masks[label - 1]
                mask[:] = decode_file(path, decode_binary, video)
        return masks

    def _labels(self, index: int) -> np.ndarray:
        files, video = self._clips[index]
        labels = decode_file(files.mask_dir / files.masks[0], decode_labels, video)
        return np.where(labels == VOID, labels.dtype.type(0), labels) if self._voc else labels


def _is_label_map(files: Files) -> bool:
    return "/" not in files.masks[0]


def open_pictures(
    root: str,
    *,
    key: str = "config.data.root",
    include: str = "",
    exclude: str = "",
    faults: Faults | None = None,
) -> PictureSource:
    """Find the pictures, check every file, and open them.

    Args:
        root: folder in one of the layouts above, local or gs:// or s3://.
        key: how the user named the folder, for messages.
        include: text file with the names of pictures to use, one a line, with or without suffix.
        exclude: text file with names to leave out.
        faults: what to do about broken pictures; by default the first one stops.

    Raises:
        UserError: the folder is missing or of another layout; a list is wrong; a picture has no
            mask, or masks in both forms; sizes differ, or a file is broken.
    """
    faults = faults or Faults()
    folder = open_root(root, key, WANTED)
    layout = next((pair for pair in LAYOUTS if is_folder(folder / pair[0])), LAYOUTS[0])
    images, masks = (folder / name for name in layout)
    if not is_folder(images) or not is_folder(masks):
        there = ", ".join(subfolders(folder)[:5]) or "no folders"
        raise UserError(f"{key}={root} holds {there}: {WANTED}")
    frames = {stem(name): name for name in image_names(images, FRAME_SUFFIXES)}
    labels = {stem(name): name for name in image_names(masks, MASK_SUFFIXES)}
    folders, notes = set(subfolders(masks)), []
    if strays := sorted({*labels, *folders} - set(frames)):
        notes.append(f"{len(strays)} masks belong to no picture: {listed(strays)}")
    if layout == VOC:
        bare = len(frames)
        frames = {name: frame for name, frame in frames.items() if name in labels}
        if bare := bare - len(frames):
            notes.append(f"{bare} pictures without a mask left out")
    if not frames:
        raise UserError(f"{images} has no pictures to use (from {key}={root}): {WANTED}")
    names = sorted(frames)
    names = [names[i] for i in choose(names, include, exclude, str(images))]

    def find(name: str) -> Files:
        return Files(name, images, [frames[name]], masks, _masks_of(name, masks, labels, folders))

    clips = check_files(collect(names, find, faults), faults)
    notes += faults.notes(len(names), str(root))
    return PictureSource(str(root), clips, notes, layout == VOC)


def _masks_of(name: str, folder: AnyPath, labels: dict[str, str], folders: set[str]) -> list[str]:
    """File names of a picture's masks."""
    if name in labels and name in folders:
        raise UserError(
            f"{folder / name} and {folder / labels[name]} are both masks of picture {name}, "
            "expected one of them: remove the other"
        )
    if name in labels:
        return [labels[name]]
    if name not in folders:
        numbered = next((mask for mask in labels.values() if mask.startswith(f"{name}_")), "")
        hint = f" ({numbered} there is to be {name}/{numbered})" if numbered else ""
        raise UserError(
            f"picture {name} has no mask, expected {folder / name}.png, or {folder / name}/ with "
            f"one PNG per object{hint}: add it, or leave the picture out by a list"
        )
    found = [f"{name}/{mask}" for mask in image_names(folder / name, MASK_SUFFIXES)]
    if not found:
        raise UserError(f"{folder / name} has no .png, expected one per object: add them")
    return found
