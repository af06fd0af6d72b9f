"""Clips as folders of images: the DAVIS layout, and flat folders as of MOSE and YouTube-VOS.

    DAVIS   JPEGImages/480p/CLIP/*.jpg   Annotations/480p/CLIP/*.png   ImageSets/2017/train.txt
    flat    JPEGImages/CLIP/*.jpg        Annotations/CLIP/*.png

Frames are JPEG or PNG, masks indexed PNG (0 background, k object k), one mask for each frame, of
the same name. All listed files are checked when a source is opened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam2_jax.data.checks import check_mask, read_headers
from sam2_jax.data.decode import decode_frame, decode_labels
from sam2_jax.data.sources import Video
from sam2_jax.types import UserError

RESOLUTIONS = ("480p", "Full-Resolution")  # of DAVIS, the first that is there
HELD_OUT = 0.1  # share of a flat folder's clips that evaluates when config.data.eval_root is empty
TRAIN, EVAL = "train", "val"
WANTED = (
    "expected JPEGImages/ and Annotations/ (DAVIS with its ImageSets/, or one folder per clip as "
    "MOSE and YouTube-VOS have)"
)


class Files(NamedTuple):
    """One clip on disk: frames and masks of equal number, in order of time."""

    video: Video
    frames: list[Path]
    masks: list[Path]


class FolderSource:
    """Clips of one folder, opened and checked by `open_folder`."""

    def __init__(self, name: str, clips: list[Files], notes: list[str]) -> None:
        """`clips` have passed the checks."""
        self.name = name
        self.notes = notes
        self._clips = clips

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def video(self, index: int) -> Video:
        """Name, length and size of a clip."""
        return self._clips[index].video

    def stem(self, index: int, frame: int) -> str:
        """Name of a frame and of its mask, without the suffix."""
        return self._clips[index].masks[frame].stem

    def read(
        self, index: int, frames: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w"]]:
        """Decode the frames asked for: RGB and label maps."""
        files = self._clips[index].frames
        return np.stack([_decode(decode_frame, files[t]) for t in frames]), self.labels(
            index, frames
        )

    def labels(self, index: int, frames: Sequence[int]) -> UInt8[np.ndarray, "t h w"]:
        """Decode label maps alone."""
        files = self._clips[index].masks
        return np.stack([_decode(decode_labels, files[t]) for t in frames])

    def select(self, indices: Sequence[int], note: str) -> "FolderSource":
        """Some of the clips, as a source of their own."""
        return FolderSource(self.name, [self._clips[i] for i in indices], [*self.notes, note])


def _decode(decoder, path: Path) -> np.ndarray:
    try:
        return decoder(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be decoded ({error}): copy or extract it again, or remove its clip"
        ) from error


def train_folder(root: str, num_frames: int, holdout: bool) -> FolderSource:
    """Training clips: DAVIS's train list, or a flat folder less the clips held out.

    Raises:
        UserError: see `open_folder`.
    """
    names, listed = _clip_names(root, TRAIN, "config.data.root")
    if listed or not holdout:
        return open_folder(root, TRAIN, num_frames)
    kept, held = _split(root, names)
    note = f"the last {len(held)} of {len(names)} clips by name are held out for evaluation"
    source = open_folder(root, TRAIN, num_frames, names=kept)
    return source.select(range(len(source)), note)


def eval_folder(root: str, eval_root: str) -> FolderSource:
    """Evaluation clips: of `eval_root`, or DAVIS's val list, or the clips held out of `root`.

    Raises:
        UserError: see `open_folder`.
    """
    if eval_root:
        return open_folder(eval_root, EVAL, key="config.data.eval_root")
    names, listed = _clip_names(root, EVAL, "config.data.root")
    if listed:
        return open_folder(root, EVAL)
    _, held = _split(root, names)
    source = open_folder(root, EVAL, names=held)
    return source.select(
        range(len(source)), f"the last {len(held)} of {len(names)} clips by name, held out"
    )


def _split(root: str, names: list[str]) -> tuple[list[str], list[str]]:
    if len(names) < 2:
        raise UserError(
            f"config.data.root={root} has one clip and none can be held out for evaluation: "
            f"set config.data.eval_root to a folder of clips to evaluate on"
        )
    count = max(1, round(HELD_OUT * len(names)))
    return names[:-count], names[-count:]


def open_folder(
    root: str,
    split: str,
    num_frames: int = 1,
    key: str = "config.data.root",
    names: list[str] | None = None,
) -> FolderSource:
    """Find the clips of a folder, check every file of theirs, and open them.

    Args:
        root: folder in one of the two layouts.
        split: `train` or `val`: which of DAVIS's lists; a flat folder gives all clips to both.
        num_frames: the fewest frames a clip may have. Clips in which no such run starts with a
            visible object are left out, and counted in the notes.
        key: how the user named the folder, for messages.
        names: only these clips.

    Raises:
        UserError: the folder is missing, empty or of no known layout; a clip lacks frames or
            masks, or they differ in number, name or size, or are too few; a mask is not indexed;
            a file is cut short; no clip has a visible object.
    """
    if names is None:
        names, _ = _clip_names(root, split, key)
    images, annotations = _folders(Path(root))
    listed = [_list_clip(images / name, annotations / name, num_frames, key) for name in names]
    headers = iter(read_headers([path for clip in listed for path in (*clip[0], *clip[1])]))
    clips = []
    for name, (frames, masks) in zip(names, listed, strict=True):
        frame_headers = [next(headers) for _ in frames]
        first = frame_headers[0]
        for path, header in zip(frames, frame_headers, strict=True):
            _check_size(path, header, first, frames[0])
        for path in masks:
            header = next(headers)
            check_mask(path, header)
            _check_size(path, header, first, frames[0])
        clips.append(Files(Video(name, len(frames), first.height, first.width), frames, masks))
    seen = [clip for clip in clips if _has_object(clip, num_frames)]
    notes = []
    if len(seen) < len(clips):
        notes.append(f"{len(clips) - len(seen)} of {len(clips)} clips left out: no visible object")
    if not seen:
        raise UserError(
            f"{key}={root} has no visible object in any of its {len(clips)} clips: every mask is "
            f"0 (background); write object k as index k"
        )
    return FolderSource(str(root), seen, notes)


def _has_object(clip: Files, num_frames: int) -> bool:
    starts = clip.masks[: len(clip.masks) - num_frames + 1]
    return any(_decode(decode_labels, path).any() for path in starts)


def _folders(root: Path) -> tuple[Path, Path]:
    """Where the clips of frames and of masks lie."""
    images, annotations = root / "JPEGImages", root / "Annotations"
    for resolution in RESOLUTIONS:
        if (images / resolution).is_dir():
            return images / resolution, annotations / resolution
    return images, annotations


def _clip_names(root: str, split: str, key: str) -> tuple[list[str], bool]:
    """Names of the clips, sorted, and whether they come from a list of the DAVIS layout."""
    if not root:
        raise UserError(f"{key} is empty: give the folder of clips, --{key}=DIR; {WANTED}")
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{key}={root} is no folder: {WANTED}")
    images, annotations = _folders(folder)
    if not images.is_dir() or not annotations.is_dir():
        inner = next((d for d in sorted(folder.iterdir()) if (d / "JPEGImages").is_dir()), None)
        hint = f"; {inner} has them, give that" if inner else ""
        there = ", ".join(sorted(d.name for d in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{key}={root} holds {there}: {WANTED}{hint}")
    if images.name in RESOLUTIONS:
        listing = folder / "ImageSets" / "2017" / f"{split}.txt"
        if not listing.is_file():
            raise UserError(
                f"{listing} is missing, though {key}={root} has the DAVIS layout: expected one "
                f"clip name a line; take it from the DAVIS 2017 archive or write it"
            )
        names = sorted({line.strip() for line in listing.read_text().splitlines()} - {""})
        where, listed = str(listing), True
    else:
        names = sorted(d.name for d in images.iterdir() if d.is_dir())
        where, listed = str(images), False
    if not names:
        raise UserError(f"{where} names no clip, expected at least one (from {key}={root})")
    return names, listed


def _list_clip(
    frame_dir: Path, mask_dir: Path, num_frames: int, key: str
) -> tuple[list[Path], list[Path]]:
    """Frames and masks of one clip, in order of time and with matching names."""
    clip = frame_dir.name
    frames = _images(frame_dir, (".jpg", ".jpeg", ".png"))
    masks = _images(mask_dir, (".png",))
    if not frames:
        raise UserError(
            f"clip {clip} has no frames: {frame_dir} has no .jpg or .png; add them, or take the "
            f"clip out of {key}"
        )
    if not masks:
        raise UserError(
            f"clip {clip} has no masks: {mask_dir} has no .png; add them, or take the clip out of "
            f"{key}"
        )
    if [p.stem for p in frames] != [p.stem for p in masks]:
        odd = sorted({p.stem for p in frames} ^ {p.stem for p in masks})
        raise UserError(
            f"clip {clip} has {len(frames)} frames in {frame_dir} but {len(masks)} masks in "
            f"{mask_dir} ({odd[0]} is on one side only), expected a mask for every frame: add or "
            f"remove files until the names match"
        )
    if len(frames) < num_frames:
        raise UserError(
            f"clip {clip} in {key} has {len(frames)} frames, fewer than config.data.num_frames="
            f"{num_frames}: lower that, or take the clip out"
        )
    return frames, masks


def _images(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.name[0] != "."]
    # 9.jpg comes before 10.jpg, as in the reference, which takes names for numbers.
    return sorted(found, key=lambda p: p.stem.rjust(20, "0") if p.stem.isdigit() else p.stem)


def _check_size(path: Path, header, first, first_path: Path) -> None:
    if (header.width, header.height) != (first.width, first.height):
        raise UserError(
            f"{path} is {header.width} x {header.height}, but {first_path} is {first.width} x "
            f"{first.height}: expected one size for all frames and masks of a clip; resize or "
            f"export it again (masks with nearest neighbour)"
        )
