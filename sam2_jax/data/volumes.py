"""Volumes in .npz files, slices taken for frames, as MedSAM2 prepares CT and MR.

    imgs   [d h w] uint8 grey, or [d h w 3] uint8 RGB
    gts    [d h w] integers or booleans: 0 background, k object k

Other members (`spacing`) are not read. What a Hounsfield unit or a float should look like on a
grey scale of 0-255 is the user's to decide: volumes of other types are refused, not rescaled.
"""

import functools
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.headers import MAX_PIXELS, Header, too_large
from sam2_jax.data.lists import choose
from sam2_jax.data.scan import changed, local_root, scan_files, walk
from sam2_jax.data.sources import Faults, Video
from sam2_jax.types import UserError

IMAGES, LABELS = "imgs", "gts"
# Decompressed arrays: a file is one compressed stream, of which a slice costs all before it. Two,
# since a clip's frames are asked for one after the other, and rarely again.
KEPT_ARRAYS = 2
WANTED = "expected .npz files with imgs [d h w] uint8 and gts [d h w] of integers"
MEND = "leave it out by config.data.exclude, or write it by np.savez_compressed(path, imgs=, gts=)"


class VolumeSource:
    """Volumes opened and checked by `open_volumes`."""

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        videos: Sequence[Video],
        visible: Sequence[Sequence[Sequence[int]]],
        notes: list[str],
    ) -> None:
        """`visible`: ids seen on every slice of every volume."""
        self.name, self.notes = name, notes
        self._paths, self._videos = list(paths), list(videos)
        self._visible = [tuple(tuple(ids) for ids in volume) for volume in visible]

    def __len__(self) -> int:
        """Number of volumes."""
        return len(self._paths)

    def video(self, index: int) -> Video:
        """Name, slices and size of a volume."""
        return self._videos[index]

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects on a slice."""
        return self._visible[index][frame]

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Slices, grey as RGB, and masks.

        Raises:
            UserError: the file is broken.
        """
        path, slices = self._paths[index], list(frames)
        images = _array(path, IMAGES)[slices]
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=-1)
        if not objects:
            return images, np.zeros((len(slices), 0, *images.shape[1:3]), bool)
        labels = _array(path, LABELS)[slices]
        return images, np.stack([labels == k for k in objects], axis=1)


def open_volumes(
    root: str,
    *,
    key: str = "config.data.root",
    include: str = "",
    exclude: str = "",
    faults: Faults | None = None,
) -> VolumeSource:
    """Find the volumes below a folder, check them, and open them.

    What was found is remembered, see `scan.scan_files`.

    Args:
        root: folder of .npz files, also in folders of their own.
        key: how the user named it.
        include: text file of the volumes to take, by their paths below the root; empty: all.
        exclude: text file of the volumes to leave out.
        faults: what to do about broken volumes.

    Raises:
        UserError: nothing there; or a volume is broken, lacks a member, or has one of another
            type or shape, or of Python objects.
    """
    faults = faults or Faults()
    folder = local_root(root, key, WANTED)
    paths = [d / name for d, names in walk(folder) for name in names if name.endswith(".npz")]
    if not paths:
        raise UserError(f"{key}={root} has no .npz file below it: {WANTED}")
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    taken = choose(names, include, exclude, f"{key}={root}")
    found = scan_files([paths[i] for i in taken], look_at_volume, where=root, faults=faults)
    kept, videos, visible = [], [], []
    for i, seen in zip(taken, found, strict=True):
        if isinstance(seen, UserError):
            faults.add(seen)
            continue
        kept.append(paths[i])
        videos.append(Video(names[i], *seen["shape"]))
        visible.append(seen["visible"])
    return VolumeSource(str(root), kept, videos, visible, faults.notes(len(taken), root))


def look_at_volume(path: Path) -> dict[str, Any]:
    """Shape [d h w] and the ids on every slice; given to `scan_files`.

    Raises:
        UserError: the volume is broken.
    """
    with _reading(path), zipfile.ZipFile(path) as file:
        shape, kind = _header(path, file, IMAGES)
        label_shape, label_kind = _header(path, file, LABELS)
    if kind != np.uint8:
        raise UserError(
            f"{path} has imgs of {kind}, expected uint8 (0-255): choose the window of values that "
            "matters, as in np.clip((imgs - low) / (high - low), 0, 1) * 255, and store it as uint8"
        )
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3) or 0 in shape:
        raise UserError(f"{path} has imgs of shape {list(shape)}, expected [d h w] or [d h w 3]")
    if too_large(Header(shape[2], shape[1], "grey", 8)):
        raise UserError(
            f"{path} has slices of {shape[2]} x {shape[1]} pixels, more than "
            f"{MAX_PIXELS // 10**6} million: shrink them (gts with nearest neighbour), or cut them"
        )
    if label_kind.kind not in "iub" or label_shape != shape[:3]:
        raise UserError(
            f"{path} has gts of {label_kind} and shape {list(label_shape)}, expected integers of "
            f"shape {list(shape[:3])}: {MEND}"
        )
    _array(path, IMAGES)  # whole?
    labels = _array(path, LABELS)
    if label_kind.kind == "i" and labels.min() < 0:
        raise UserError(
            f"{path} has gts down to {labels.min()}, expected 0 for background and positive "
            f"numbers for objects: {MEND}"
        )
    visible = [[int(k) for k in np.unique(labels[t]) if k] for t in range(shape[0])]
    return {"shape": list(shape[:3]), "visible": visible}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read is the file's fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy let nearly anything escape on broken bytes
        raise UserError(
            f"{path} cannot be read ({type(error).__name__} {error}), expected an .npz file that "
            "is whole: copy or write it again"
        ) from error


def _header(
    path: Path, file: zipfile.ZipFile, member: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a member, without decompressing it."""
    name = f"{member}.npy"
    if name not in file.namelist():
        there = ", ".join(n.removesuffix(".npy") for n in file.namelist()[:5]) or "nothing"
        raise UserError(f"{path} holds {there}, expected imgs and gts: {MEND}")
    with file.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
        held = file.getinfo(name).file_size - stream.tell()
    if kind.hasobject:
        raise UserError(
            f"{path} has {member} of Python objects, which could run any code when loaded, "
            "expected an array of numbers: store it with a numeric dtype"
        )
    if held != (expected := kind.itemsize * int(np.prod(shape, dtype=object))):
        raise UserError(
            f"{path} has {held:,} bytes of {member}, expected {expected:,} for {kind} of shape "
            f"{list(shape)}: {MEND}"
        )
    return shape, kind


def _array(path: Path, member: str) -> np.ndarray:
    return _load(path, member, changed(path))


@functools.lru_cache(maxsize=2 * KEPT_ARRAYS)
def _load(path: Path, member: str, time: int) -> np.ndarray:
    del time  # part of the key: a file may be mended while this process runs
    with _reading(path):
        with zipfile.ZipFile(path) as file:
            _header(path, file, member)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[member]
