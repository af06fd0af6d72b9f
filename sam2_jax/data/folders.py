"""Clips as folders of images: the DAVIS layout, and flat folders as of MOSE and YouTube-VOS.

    DAVIS   JPEGImages/480p/CLIP/*.jpg   Annotations/480p/CLIP/*.png   ImageSets/2017/train.txt
    flat    JPEGImages/CLIP/*.jpg        Annotations/CLIP/*.png

Frames are JPEG or PNG, masks PNG of the same names: indexed or grey with 16 bits (0 background,
k object k), or black and white for one object, as in DAVIS 2016. All files that are used are
checked when a source is opened.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool

from sam2_jax.data.checks import check_files
from sam2_jax.data.davis import clip_folders, listed_clips
from sam2_jax.data.decode import decode_labels, masks_of, visible_ids
from sam2_jax.data.file_source import FileSource, decode_file
from sam2_jax.data.files import (
    Files,
    collect,
    entries_of,
    is_folder,
    open_root,
    pair_files,
    stem,
    subfolders,
)
from sam2_jax.data.lists import choose
from sam2_jax.data.sources import THREADS, Faults, Video
from sam2_jax.types import UserError

HELD_OUT = 0.1  # share of a flat folder's clips that evaluates when config.data.eval_root is empty
TRAIN, EVAL = "train", "val"
ROOT, EVAL_ROOT = "config.data.root", "config.data.eval_root"
WANTED = (
    "expected JPEGImages/ and Annotations/ (DAVIS with its ImageSets/, or one folder per clip as "
    "MOSE and YouTube-VOS have)"
)


class FolderSource(FileSource):
    """Clips of one folder, opened and checked by `open_folder`. As many masks as frames."""

    def __init__(
        self,
        name: str,
        clips: Sequence[tuple[Files, Video]],
        notes: list[str],
        only: Sequence[int] = (),
    ) -> None:
        """`only`: for each clip the id of the only object that it shows, if there is one."""
        super().__init__(name, clips, notes)
        self._only = list(only)

    def stem(self, index: int, frame: int) -> str:
        """Name of a frame's mask, without the suffix."""
        return stem(self._clips[index][0].masks[frame])

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects visible on a frame, ascending."""
        ids = visible_ids(self._labels(index, frame))
        return tuple(set(ids) & {self._only[index]}) if self._only else ids

    def _masks(self, index: int, frame: int, objects: Sequence[int]) -> Bool[np.ndarray, "o h w"]:
        return masks_of(self._labels(index, frame), objects)

    def _labels(self, index: int, frame: int) -> np.ndarray:
        files, video = self._clips[index]
        return decode_file(files.mask_dir / files.masks[frame], decode_labels, video)

    def one_object_each(self, faults: Faults) -> "FolderSource":
        """Every object of every clip as a clip of its own, CLIP/ID.

        All masks are decoded to find the ids: a second per thousand on one core.
        """

        def ids(index: int) -> set[int] | UserError:
            try:
                count = self.video(index).num_frames
                return {label for t in range(count) for label in self.objects(index, t)}
            except UserError as error:
                return error

        clips, only = [], []
        with ThreadPoolExecutor(THREADS) as pool:
            for (files, video), found in zip(
                self._clips, pool.map(ids, range(len(self))), strict=True
            ):
                if isinstance(found, UserError):
                    faults.add(found)
                    continue
                for label in sorted(found):
                    clips.append((files, video._replace(name=f"{video.name}/{label}")))
                    only.append(label)
        return FolderSource(self.name, clips, self.notes, only)


def train_folder(
    root: str,
    holdout: bool,
    *,
    key: str = ROOT,
    include: str = "",
    exclude: str = "",
    resolution: str = "",
    sample_rate: int = 1,
    annotated_every: int = 1,
    single_object: bool = False,
    faults: Faults | None = None,
) -> FolderSource:
    """Training clips: DAVIS's train list, or a flat folder less the clips held out.

    Arguments and errors are those of `open_folder`; the clips held out are the last of those that
    `include` and `exclude` leave.
    """
    names, is_listed = _clip_names(root, TRAIN, key, include, exclude, resolution)
    notes = []
    if holdout and not is_listed:
        names, held = _split(root, names, key)
        total = len(names) + len(held)
        notes.append(f"the last {len(held)} of {total} clips by name are held out for evaluation")
    source = open_folder(
        root,
        TRAIN,
        key=key,
        names=names,
        resolution=resolution,
        sample_rate=sample_rate,
        annotated_every=annotated_every,
        single_object=single_object,
        faults=faults,
    )
    source.notes[:0] = notes
    return source


def eval_folder(
    root: str,
    eval_root: str,
    *,
    key: str = ROOT,
    include: str = "",
    exclude: str = "",
    resolution: str = "",
    sample_rate: int = 1,
    annotated_every: int = 1,
    single_object: bool = False,
    faults: Faults | None = None,
) -> FolderSource:
    """Evaluation clips: of `eval_root`, or DAVIS's val list, or the clips held out of `root`.

    Arguments and errors are those of `open_folder`. `include` and `exclude` choose among the clips
    that are trained on and held out, so they do not apply to `eval_root` and to DAVIS's val list;
    give the same as to `train_folder`.
    """
    names, notes = None, []
    if eval_root:
        root, key = eval_root, EVAL_ROOT
    else:
        names, is_listed = _clip_names(root, EVAL, key, "", "", resolution)
        if not is_listed:
            names, _ = _clip_names(root, EVAL, key, include, exclude, resolution)
            total = len(names)
            _, names = _split(root, names, key)
            notes = [f"the last {len(names)} of {total} clips by name, held out"]
    source = open_folder(
        root,
        EVAL,
        key=key,
        names=names,
        resolution=resolution,
        sample_rate=sample_rate,
        annotated_every=annotated_every,
        single_object=single_object,
        faults=faults,
    )
    source.notes[:0] = notes
    return source


def _split(root: str, names: list[str], key: str) -> tuple[list[str], list[str]]:
    if len(names) < 2:
        raise UserError(
            f"{key}={root} has one clip and none can be held out for evaluation: set {EVAL_ROOT} "
            "to a folder of clips to evaluate on"
        )
    count = max(1, round(HELD_OUT * len(names)))
    return names[:-count], names[-count:]


def open_folder(
    root: str,
    split: str,
    *,
    key: str = ROOT,
    names: Sequence[str] | None = None,
    include: str = "",
    exclude: str = "",
    resolution: str = "",
    sample_rate: int = 1,
    annotated_every: int = 1,
    single_object: bool = False,
    faults: Faults | None = None,
) -> FolderSource:
    """Find the clips of a folder, check every file that is used, and open them.

    Args:
        root: folder in one of the two layouts, local or gs:// or s3://.
        split: `train` or `val`: which of DAVIS's lists; a flat folder gives all clips to both.
        key: how the user named the folder, for messages.
        names: exactly these clips, whatever lists there are.
        include: text file with the clips to use, one a line.
        exclude: text file with clips to leave out.
        resolution: of DAVIS: 480p, Full-Resolution (2017), 1080p (2016); empty: the first of these.
        sample_rate: take every k-th frame only (`sample_rate` of the reference's PNGRawDataset,
            facebookresearch/sam2@2b90b9f training/dataset/vos_raw_dataset.py).
        annotated_every: every k-th frame has a mask, counted from the first that has one; the
            frames between are left out.
        single_object: every object of every clip becomes a clip of its own, as the reference's
            `single_object_mode` does for folders of masks per object.
        faults: what to do about broken clips; by default the first one stops.

    Raises:
        UserError: the folder is missing, empty or of no known layout; a list is missing, empty or
            names a clip that is not there; a clip lacks frames or masks, or they differ in name
            or size; a mask has colours; a file is cut short, too large or cannot be read.
    """
    for name, value in (("sample_rate", sample_rate), ("annotated_every", annotated_every)):
        if value < 1:
            raise UserError(f"{name} of {key}={root} is {value}, expected 1 or more: raise it")
    faults = faults or Faults()
    if names is None:
        names, _ = _clip_names(root, split, key, include, exclude, resolution)
    folder = open_root(root, key, WANTED)
    images, annotations, _ = clip_folders(folder, resolution, key)

    def find(name: str) -> Files:
        return pair_files(name, images / name, annotations / name, sample_rate, annotated_every)

    clips = check_files(collect(names, find, faults), faults)
    source = FolderSource(str(root), clips, [])
    if single_object:
        source = source.one_object_each(faults)
    source.notes += faults.notes(len(names), str(root))
    return source


def _clip_names(
    root: str, split: str, key: str, include: str, exclude: str, resolution: str
) -> tuple[list[str], bool]:
    """Names of the clips, sorted, and whether they come from a list of DAVIS."""
    folder = open_root(root, key, WANTED)
    images, annotations, is_davis = clip_folders(folder, resolution, key)
    if not is_folder(images) or not is_folder(annotations):
        entries = sorted(entries_of(folder))
        inner = next((d for d in entries if is_folder(d / "JPEGImages")), None)
        hint = f"; {inner} has them, give that" if inner else ""
        there = ", ".join(d.name for d in entries[:5]) or "nothing"
        raise UserError(f"{key}={root} holds {there}: {WANTED}{hint}")
    if is_davis:
        names, listing = listed_clips(folder, split, key)
        where = str(listing)
    else:
        names, where = subfolders(images), str(images)
        if not names:
            raise UserError(f"{images} has no folder of frames (from {key}={root}): {WANTED}")
    return [names[i] for i in choose(names, include, exclude, where)], is_davis
