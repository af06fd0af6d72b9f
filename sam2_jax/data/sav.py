"""SA-V: JSON masklets beside extracted frames or mp4 files.

    sav_000/sav_000001.mp4   sav_000/sav_000001_manual.json   sav_000/sav_000001_auto.json
    or sav_000001/00000.jpg 00004.jpg ..., named by their numbers in the video, and the JSON files

Frames of a clip are those that are annotated, one in four of the video (6 a second of 24). Objects
are numbered from 1 in the order of the file.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data import mp4
from sam2_jax.data.file_source import read_file
from sam2_jax.data.files import entries_of
from sam2_jax.data.lists import choose
from sam2_jax.data.masklets import (
    MEND,
    Masklets,
    complete_rows,
    object_mask,
    read_masklets,
    visible_objects,
)
from sam2_jax.data.scan import (
    decode_pictures,
    frame_size,
    local_root,
    scan_files,
    walk,
)
from sam2_jax.data.sources import Faults, Video
from sam2_jax.types import UserError

ANNOTATIONS = ("manual", "auto")
FRAMES = (".jpg", ".jpeg")
WANTED = "expected NAME_{}.json beside NAME.mp4 or a folder NAME of extracted JPEG frames"


class Clip(NamedTuple):
    """One video: of each annotated frame its row in the JSON file and who is seen there."""

    video: Video
    json: Path
    pictures: Path  # an mp4 file or a folder of frames
    every: int  # row i is frame i * every of the video
    rows: tuple[int, ...]
    visible: tuple[int, ...]  # bit k - 1: object k has pixels


class SavSource:
    """Clips opened and checked by `open_sav`."""

    def __init__(self, name: str, clips: Sequence[Clip], notes: list[str]) -> None:
        """`clips` have passed the checks."""
        self.name, self.notes = name, notes
        self._clips = list(clips)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def video(self, index: int) -> Video:
        """Name, annotated frames and size of a clip."""
        return self._clips[index].video

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects with pixels on an annotated frame."""
        bits = self._clips[index].visible[frame]
        return tuple(k for k in range(1, bits.bit_length() + 1) if bits >> (k - 1) & 1)

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Decode annotated frames and masks.

        Raises:
            UserError: a file is broken; or a frame is not of the size that the JSON file says.
        """
        clip = self._clips[index]
        size = (clip.video.height, clip.video.width)
        masks = np.zeros((len(frames), len(objects), *size), bool)
        if objects:
            masklets = read_masklets(clip.json, clip.every)
            for i, t in enumerate(frames):
                for j, k in enumerate(objects):
                    masks[i, j] = object_mask(masklets, clip.rows[t], k)
        numbers = [clip.rows[t] * clip.every for t in frames]
        if clip.pictures.is_dir():
            return decode_pictures([_file(clip.pictures, n) for n in numbers], clip.video), masks
        if not numbers:
            return np.zeros((0, *size, 3), np.uint8), masks
        images = mp4.read_frames(clip.pictures, numbers)
        _check_size(clip.pictures, images.shape[1:3], clip.json, size)
        return images, masks


class ExtractedSavSource(SavSource):
    """Clips whose frames have all been extracted to JPEG files."""

    def encoded(self, index: int, frame: int) -> bytes:
        """The JPEG file of an annotated frame."""
        clip = self._clips[index]
        return read_file(_file(clip.pictures, clip.rows[frame] * clip.every))


def open_sav(
    root: str,
    *,
    key: str = "config.data.root",
    annotations: str = "manual",
    ann_every: int = 4,
    include: str = "",
    exclude: str = "",
    faults: Faults | None = None,
) -> SavSource:
    """Find the clips below a folder, check annotations and videos, and open them.

    Every mask is checked to be whole, every frame file and mp4 file to be of its size and length.
    Extracted frames go before an mp4 file of the same name. What was found is remembered, see
    `scan.scan_files`.

    Args:
        root: folder; JSON files, videos and frames may lie anywhere below it.
        key: how the user named it.
        annotations: `manual` or `auto`.
        ann_every: annotated is every so manieth frame; a field `fps` of a file goes before it.
        include: text file of the clips to take; empty: all.
        exclude: text file of the clips to leave out.
        faults: what to do about broken clips.

    Returns:
        A source, an `EncodedSource` if all frames are extracted.

    Raises:
        UserError: nothing there; or a clip is broken, lacks its video, or has another size or
            fewer frames than its annotations.
    """
    faults = faults or Faults()
    if annotations not in ANNOTATIONS:
        raise UserError(
            f"SA-V has no annotations {annotations!r}, expected {' or '.join(ANNOTATIONS)}: change "
            f"{key.removesuffix('root')}sav.annotations"
        )
    if ann_every < 1:
        raise UserError(
            f"{key.removesuffix('root')}sav.ann_every is {ann_every}, expected a positive number "
            "of frames, 4 for SA-V"
        )
    ending, wanted = f"_{annotations}.json", WANTED.format(annotations)
    found = _find(local_root(root, key, wanted), ending)
    if not found:
        raise UserError(f"{key}={root} has no file *{ending} below it: {wanted}")
    names = sorted(found)
    names = [names[i] for i in choose(names, include, exclude, f"{key}={root}")]
    pairs = []
    for name in names:
        json, pictures = found[name]
        if pictures:
            pairs.append((json, pictures))
        else:
            faults.add(UserError(f"{json} has neither {name}.mp4 nor frames in {name}/: {MEND}"))
    look = functools.partial(look_at_clip, ann_every=ann_every)
    clips, total = [], 0
    for pair, seen in zip(pairs, scan_files(pairs, look, where=root, faults=faults), strict=True):
        if isinstance(seen, UserError):
            faults.add(seen)
            continue
        name = pair[0].name.removesuffix(ending)
        video = Video(name, len(seen["rows"]), seen["height"], seen["width"])
        rows, visible = tuple(seen["rows"]), tuple(seen["visible"])
        clips.append(Clip(video, pair[0], pair[1], seen["every"], rows, visible))
        total += seen["total"]
    notes = faults.notes(len(names), root)
    if left := total - sum(len(clip.rows) for clip in clips):
        notes.append(f"{left:,} of {total:,} annotated frames left out: an object lacks its mask")
    extracted = all(clip.pictures.is_dir() for clip in clips)
    return (ExtractedSavSource if extracted else SavSource)(str(root), clips, notes)


def _find(root: Path, ending: str) -> dict[str, tuple[Path, Path | None]]:
    """Annotations and pictures of every clip, by name."""
    json: dict[str, Path] = {}
    pictures: dict[str, list[Path]] = defaultdict(list)
    for folder, names in walk(root):
        if any(name.lower().endswith(FRAMES) for name in names):
            pictures[folder.name].append(folder)
        for name in names:
            if name.endswith(ending):
                clip = name.removesuffix(ending)
                if clip in json:
                    raise UserError(
                        f"{json[clip]} and {folder / name} annotate one clip, expected one file "
                        "for it: remove the other"
                    )
                json[clip] = folder / name
            elif name.lower().endswith(".mp4"):
                pictures[name[:-4]].append(folder / name)
    found = {}
    for clip, path in json.items():
        choice = [(not p.is_dir(), p.parent != path.parent, p) for p in pictures.get(clip, [])]
        found[clip] = (path, min(choice)[-1] if choice else None)
    return found


def look_at_clip(json: Path, pictures: Path, ann_every: int) -> dict[str, Any]:
    """Size, usable rows and visible objects of one clip; given to `scan_files`.

    Raises:
        UserError: the clip is broken.
    """
    masklets = read_masklets(json, ann_every)
    rows = complete_rows(masklets)
    _check_pictures(pictures, masklets, [i * masklets.every for i in rows])
    seen = [visible_objects(masklets, i) for i in rows]
    return {
        "height": masklets.height,
        "width": masklets.width,
        "every": masklets.every,
        "total": len(masklets.rows),
        "rows": rows,
        "visible": [sum(1 << (k - 1) for k in ids) for ids in seen],
    }


def _check_pictures(pictures: Path, masklets: Masklets, numbers: list[int]) -> None:
    """Are all annotated frames there, and of the size of the masks?"""
    size = (masklets.height, masklets.width)
    hint = f"or set sav.ann_every if not every {masklets.every}th frame is annotated"
    if not pictures.is_dir():
        header = mp4.read_header(pictures)
        _check_size(pictures, (header.height, header.width), masklets.path, size)
        if numbers and numbers[-1] >= header.num_frames:
            raise UserError(
                f"{pictures} has {header.num_frames} frames, but {masklets.path} annotates number "
                f"{numbers[-1]}: {MEND}, {hint}"
            )
        return
    files = _files(pictures)
    if missing := [t for t in numbers if t not in files]:
        raise UserError(
            f"{pictures} lacks {missing[0]:05d}.jpg, {len(missing)} of the {len(numbers)} frames "
            f"that {masklets.path} annotates: extract them again, {hint}"
        )
    for t in numbers:
        _check_size(files[t], frame_size(files[t]), masklets.path, size)


def _check_size(path: Path, found: tuple[int, ...], json: Path, wanted: tuple[int, int]) -> None:
    if tuple(found) != wanted:
        raise UserError(
            f"{path} is {found[1]} x {found[0]}, but {json} is for {wanted[1]} x {wanted[0]}: take "
            "the video that was annotated, at its own size"
        )


def _files(folder: Path) -> dict[int, Path]:
    """Extracted frames by their number in the video."""
    files = [path for path in entries_of(folder) if path.suffix.lower() in FRAMES]
    return {int(path.stem): Path(path) for path in files if path.stem.isdecimal()}


def _file(folder: Path, number: int) -> Path:
    """An extracted frame; the reference names it by five digits."""
    path = folder / f"{number:05d}.jpg"
    return path if path.is_file() else _files(folder).get(number, path)
