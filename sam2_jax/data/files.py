"""Files of clips: where they lie, in which order, and which belong together.

A root is a local folder, or gs://BUCKET/PATH or s3://BUCKET/PATH through etils, which needs the
package gcsfs or s3fs for it.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from etils import epath

from sam2_jax.data.sources import THREADS, Faults
from sam2_jax.types import UserError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MASK_SUFFIXES = (".png",)
AnyPath = Path | epath.Path  # local, which is quicker, or not
CLOUDS = {"gs": "gcsfs", "s3": "s3fs"}  # the package that reads each


class Files(NamedTuple):
    """Files of one clip, by names relative to a folder: paths would take ten times the memory.

    Frames are in order of time. What the masks belong to is the source's business.
    """

    name: str
    frame_dir: AnyPath
    frames: list[str]
    mask_dir: AnyPath
    masks: list[str]

    def paths(self) -> list[AnyPath]:
        """Frames, then masks."""
        return [self.frame_dir / n for n in self.frames] + [self.mask_dir / n for n in self.masks]


def open_root(root: str, key: str, wanted: str) -> AnyPath:
    """The folder that a user named.

    Args:
        root: what they gave.
        key: how they gave it, for messages.
        wanted: what should be in it, in words.

    Raises:
        UserError: nothing was given, or it is no folder or cannot be reached.
    """
    if not root:
        raise UserError(f"{key} is empty: give the folder, --{key.lstrip('-')}=DIR; {wanted}")
    path: AnyPath = Path(root)
    package = ""
    if "://" in root:
        package = CLOUDS.get(root.split("://")[0], "")
        if not package:
            raise UserError(
                f"{key}={root} is of no kind that can be read, expected a local folder, gs:// or "
                "s3://: copy it to one of these"
            )
        path = epath.Path(root)
    try:
        found = path.is_dir()
    except ImportError as error:
        raise UserError(f"{key}={root} needs a package: pip install {package} ({error})") from error
    except Exception as error:  # each cloud has errors of its own: credentials, network, bucket
        raise UserError(f"{key}={root} cannot be reached ({error}): {wanted}") from error
    if not found:
        raise UserError(f"{key}={root} is no folder: {wanted}")
    return path


def subfolders(folder: AnyPath) -> list[str]:
    """Names of the folders in a folder, sorted. Hidden ones do not count."""
    entries = [path for path in entries_of(folder) if not path.name.startswith(".")]
    # One question each to a network file system; few entries are not worth the threads.
    with ThreadPoolExecutor(min(THREADS, 1 + len(entries) // THREADS)) as pool:
        folders = pool.map(is_folder, entries)
        return sorted(path.name for path, is_dir in zip(entries, folders, strict=True) if is_dir)


def is_folder(path: AnyPath) -> bool:
    """Whether there is such a folder.

    Raises:
        UserError: one above it may not be looked into.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: AnyPath | str, error: Exception) -> UserError:
    """What to say of a folder that the system refuses to show."""
    return UserError(f"{path} cannot be read ({error}): give read permission, or copy it again")


def entries_of(folder: AnyPath) -> list[AnyPath]:
    """What is in a folder; nothing if there is no such folder.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        return list(folder.iterdir())
    except Exception as error:  # clouds have errors of their own, for a missing folder too
        try:
            there = folder.is_dir()
        except OSError:
            there = True
        if not there:
            return []
        raise unreadable(folder, error) from error


def image_names(folder: AnyPath, suffixes: tuple[str, ...]) -> list[str]:
    """Names of the pictures in a folder, in order of time.

    Raises:
        UserError: it cannot be listed, or two pictures have one name but for the suffix.
    """
    names = [p.name for p in entries_of(folder) if p.suffix.lower() in suffixes]
    # 9.jpg comes before 10.jpg, as in the reference, which takes names for numbers.
    names = sorted((n for n in names if n[0] != "."), key=lambda n: (number_key(stem(n)), n))
    for one, other in pairwise(names):
        if number_key(stem(one)) == number_key(stem(other)):
            raise UserError(
                f"{folder} has both {one} and {other}, expected one picture of each name: remove "
                "one of them"
            )
    return names


def stem(name: str) -> str:
    """A name without folders and suffix."""
    return os.path.splitext(os.path.basename(name))[0]


def number_key(text: str) -> str:
    """Sorts numbers by value, and is equal for 7 and 00007, as in the reference."""
    return text.rjust(20, "0") if text.isdecimal() else text


def check_gaps(clip: str, folder: AnyPath, names: Sequence[str]) -> None:
    """Are all frames there? Known only of names that are numbers and mostly in equal steps.

    Raises:
        UserError: one is missing; it is named.
    """
    stems = [stem(name) for name in names]
    if len(stems) < 3 or not all(s.isdecimal() for s in stems):
        return
    numbers = [int(s) for s in stems]
    steps = [b - a for a, b in pairwise(numbers)]
    step, often = Counter(steps).most_common(1)[0]
    if 2 * often <= len(steps) or any(s % step for s in steps):
        return  # numbers that mean something else
    for (number, text), found in zip(zip(numbers, stems, strict=True), steps, strict=False):
        if found != step:
            missing = str(number + step).rjust(len(text), "0")
            raise UserError(
                f"clip {clip} lacks frame {missing} in {folder}, which goes on at "
                f"{number + found}: add it, or number the frames without a gap"
            )


def collect(names: Sequence[str], find: Callable[[str], Files], faults: Faults) -> list[Files]:
    """The files of many clips; `find` raises a UserError where a clip is broken."""

    def found(name: str) -> Files | UserError:
        try:
            return find(name)
        except UserError as error:
            return error

    clips = []
    with ThreadPoolExecutor(THREADS) as pool:
        for clip in pool.map(found, names):
            if isinstance(clip, UserError):
                faults.add(clip)
            else:
                clips.append(clip)
    return clips


def pair_files(
    name: str, frame_dir: AnyPath, mask_dir: AnyPath, sample_rate: int, annotated_every: int
) -> Files:
    """Frames and masks of one clip that are used, of equal number and matching names.

    `sample_rate` and `annotated_every` are those of `folders.open_folder`.

    Raises:
        UserError: there are no frames or masks, one is missing, or none can be used.
    """
    frames = image_names(frame_dir, FRAME_SUFFIXES)
    masks = {number_key(stem(m)): m for m in image_names(mask_dir, MASK_SUFFIXES)}
    for what, found, folder in (("frames", frames, frame_dir), ("masks", masks, mask_dir)):
        if not found:
            hint = " but folders, as of one per object" if subfolders(folder) else ""
            raise UserError(
                f"clip {name} has no {what}: {folder} has no pictures{hint}; add them, or take the "
                "clip out"
            )
    check_gaps(name, frame_dir, frames)
    keys = [number_key(stem(f)) for f in frames]
    first = next((place for place, key in enumerate(keys) if key in masks), 0)
    used = [
        place
        for place in range(0, len(frames), sample_rate)
        if (place - first) % annotated_every == 0
    ]
    odd = [keys[place] for place in used if keys[place] not in masks]
    odd += sorted(set(masks) - set(keys))
    if odd:
        at = stem(masks.get(odd[0]) or frames[keys.index(odd[0])])
        each = "every frame" if annotated_every == 1 else f"every frame in {annotated_every}"
        raise UserError(
            f"clip {name} has {len(frames)} frames in {frame_dir} but {len(masks)} masks in "
            f"{mask_dir} ({at} is on one side only), expected a mask for {each}: add or remove "
            "files until the names match, or set folder.annotated_every"
        )
    if not used:
        raise UserError(
            f"clip {name} has no frame that is both one in {sample_rate} and annotated in "
            f"{mask_dir}: lower folder.sample_rate"
        )
    return Files(
        name, frame_dir, [frames[i] for i in used], mask_dir, [masks[keys[i]] for i in used]
    )
