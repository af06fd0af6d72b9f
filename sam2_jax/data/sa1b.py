"""SA-1B: images with a JSON file of masks each, `sa_1.jpg` and `sa_1.json`. Clips of one frame.

Objects are numbered from 1 in the order of the file, those left out not counted. Which are left
out is the reference's rule (facebookresearch/sam2@2b90b9f training/dataset/vos_segment_loader.py,
SA1BSegmentLoader) but for one defect: it looks for the stability of a mask in `uncertain_iou`,
which the released files do not have (they call it `stability_score`), so that its threshold lets
everything pass. Here `uncertain_iou` is read where it is, else `stability_score`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.file_source import read_file
from sam2_jax.data.lists import choose
from sam2_jax.data.rle import decode_rle, rle_area
from sam2_jax.data.scan import (
    changed,
    decode_pictures,
    frame_size,
    load_json,
    local_root,
    scan_files,
    walk,
)
from sam2_jax.data.sources import Faults, Video
from sam2_jax.types import UserError

STABILITY = ("uncertain_iou", "stability_score")
WHOLE = 1.0  # max_area above this lets every mask pass
KEPT_FILES = 8  # parsed, some hundred kilobytes each
MEND = "download it again, or leave the image out by config.data.exclude"
WANTED = "expected NAME.jpg and NAME.json of every image, anywhere below it"


class Sa1bSource:
    """Images opened and checked by `open_sa1b`.

    SA-1B has 11 million of them, and loader processes receive copies: names are kept as bytes in
    one array, folders by number.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[tuple[Path, Path]],
        seen: Sequence[Sequence[int]],
        filters: tuple[float, float],
        notes: list[str],
    ) -> None:
        """`files`: JSON and JPEG; `seen`: height, width, number of objects; of every image."""
        self.name, self.notes, self._filters = name, notes, filters
        numbers: dict[Path, int] = {}
        self._places = np.array(
            [[numbers.setdefault(p.parent, len(numbers)) for p in pair] for pair in files], np.int32
        ).reshape(-1, 2)
        self._folders = list(numbers)
        self._names = [np.array([pair[k].name.encode() for pair in files], "S") for k in range(2)]
        self._seen = np.array(seen, np.int32).reshape(-1, 3)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._seen)

    def _path(self, index: int, kind: int) -> Path:
        """The JSON (0) or JPEG (1) file."""
        return self._folders[self._places[index, kind]] / self._names[kind][index].decode()

    def video(self, index: int) -> Video:
        """Name and size of an image, as a clip of one frame."""
        height, width, _ = self._seen[index].tolist()
        return Video(self._path(index, 1).stem, 1, height, width)

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects, without decoding."""
        return tuple(range(1, int(self._seen[index, 2]) + 1))

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Decode the image, as often as `frames` names its frame 0, and some of the masks.

        Raises:
            UserError: a file is broken or of another size than the other.
        """
        video, json = self.video(index), self._path(index, 0)
        size = (video.height, video.width)
        masks = np.zeros((len(frames), len(objects), *size), bool)
        kept = _annotations(json, *self._filters)[2] if objects and frames else []
        for j, k in enumerate(objects):
            if k <= len(kept):
                masks[:, j] = decode_rle(kept[k - 1], *size, f"{json}: object {k}")
        return decode_pictures([self._path(index, 1) for _ in frames], video), masks

    def encoded(self, index: int, frame: int) -> bytes:
        """The JPEG file."""
        return read_file(self._path(index, 1))


def open_sa1b(
    root: str,
    *,
    key: str = "config.data.root",
    max_area: float = 1.1,
    min_stability: float = -1.0,
    include: str = "",
    exclude: str = "",
    faults: Faults | None = None,
) -> Sa1bSource:
    """Find the images below a folder, check their files, and open them.

    What was found is remembered, see `scan.scan_files`.

    Args:
        root: folder; images and JSON files may lie anywhere below it.
        key: how the user named it.
        max_area: masks that cover this share of the image or more are left out; above 1: none.
        min_stability: masks whose stability score, 0-1, is lower are left out.
        include: text file of the images to take; empty: all.
        exclude: text file of the images to leave out.
        faults: what to do about broken images.

    Raises:
        UserError: nothing there; or an image or its JSON file is missing or broken.
    """
    faults = faults or Faults()
    pairs = _find(local_root(root, key, WANTED))
    if not pairs:
        raise UserError(f"{key}={root} has neither .jpg nor .json files below it: {WANTED}")
    names = [(json or image or Path(root)).stem for json, image in pairs]
    pairs = [pairs[i] for i in choose(names, include, exclude, f"{key}={root}")]
    whole = []
    for json, image in pairs:
        if json and image:
            whole.append((json, image))
        elif json:
            faults.add(UserError(f"{json} has no image {json.stem}.jpg below {root}: {MEND}"))
        else:
            assert image
            faults.add(UserError(f"{image} has no {image.stem}.json below {root}: {MEND}"))
    look = functools.partial(look_at_image, max_area=max_area, min_stability=min_stability)
    files, seen, left = [], [], 0
    for pair, found in zip(whole, scan_files(whole, look, where=root, faults=faults), strict=True):
        if isinstance(found, UserError):
            faults.add(found)
            continue
        files.append(pair)
        seen.append(found[:3])
        left += found[3]
    notes = faults.notes(len(pairs), root)
    if left:
        total = left + sum(n for _, _, n in seen)
        notes.append(f"{left:,} of {total:,} masks left out: empty, too large or not stable")
    return Sa1bSource(str(root), files, seen, (max_area, min_stability), notes)


def _find(root: Path) -> list[tuple[Path | None, Path | None]]:
    """JSON and image of every name, beside each other or in folders of their own; sorted."""
    pairs: list[tuple[Path | None, Path | None]] = []
    lone_json: dict[str, Path] = {}
    lone_images: dict[str, Path] = {}
    for folder, names in walk(root):
        images = {name[:-4] for name in names if name.endswith(".jpg")}
        json = {name[:-5] for name in names if name.endswith(".json")}
        pairs += [(folder / f"{n}.json", folder / f"{n}.jpg") for n in sorted(images & json)]
        lone_json |= {name: folder / f"{name}.json" for name in json - images}
        lone_images |= {name: folder / f"{name}.jpg" for name in images - json}
    lone = sorted({*lone_json, *lone_images})
    return pairs + [(lone_json.get(name), lone_images.get(name)) for name in lone]


def look_at_image(json: Path, image: Path, max_area: float, min_stability: float) -> list[int]:
    """Height, width, number of masks kept and left out; given to `scan_files`.

    Raises:
        UserError: a file or a mask is broken, or they are of different sizes.
    """
    height, width, kept, left = _annotations(json, max_area, min_stability)
    for k, rle in enumerate(kept, 1):
        rle_area(rle, height, width, f"{json}: object {k}")  # so that training does not meet it
    if (size := frame_size(image)) != (height, width):
        raise UserError(
            f"{image} is {size[1]} x {size[0]}, but {json} is for {width} x {height}: {MEND}"
        )
    return [height, width, len(kept), left]


def _annotations(path: Path, max_area: float, min_stability: float) -> tuple[int, int, list, int]:
    """Height, width, run lengths of the masks that are kept, number of those left out."""
    return _parse(path, max_area, min_stability, changed(path))


@functools.lru_cache(maxsize=KEPT_FILES)
def _parse(
    path: Path, max_area: float, min_stability: float, time: int
) -> tuple[int, int, list, int]:
    del time  # part of the key: a file may be mended while this process runs
    data: Any = load_json(path)
    try:
        height, width = int(data["image"]["height"]), int(data["image"]["width"])
        annotations = data["annotations"]
        kept = [
            a["segmentation"]
            for a in annotations
            if _passes(a, height * width, max_area, min_stability)
        ]
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{path} lacks what SA-1B's files have (image with height and width, annotations with "
            f"segmentation and area; {type(error).__name__} {error}): {MEND}"
        ) from error
    return height, width, kept, len(annotations) - len(kept)


def _passes(annotation: Mapping[str, Any], pixels: int, max_area: float, stable: float) -> bool:
    if not annotation["area"] > 0:
        return False
    score = next((annotation[field] for field in STABILITY if field in annotation), stable)
    if score < stable:
        return False
    return max_area > WHOLE or annotation["area"] / pixels < max_area
