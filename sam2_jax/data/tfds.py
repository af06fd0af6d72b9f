"""The copies of DAVIS and YouTube-VIS that tensorflow-datasets prepares, read without TensorFlow.

A prepared split is a set of array_record files with one clip each record, random access. The
datasets' own readers decode whole clips (90 frames for 8); here only the frames asked for are.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.lists import choose
from sam2_jax.data.records import (
    MEND,
    Record,
    count_records,
    look_at_record,
    read_record,
    record_masks,
)
from sam2_jax.data.scan import changed, scan_files
from sam2_jax.data.sources import Faults, Video
from sam2_jax.types import UserError

# Configurations of each dataset; the first is taken where none is named.
DATASETS = {
    "davis": ("480p", "full_resolution"),
    "youtube_vis": (
        "full",
        "only_frames_with_labels",
        "480_640_full",
        "480_640_only_frames_with_labels",
    ),
}
LABELLED = "only_frames_with_labels"
DEFAULT_DIR = "~/tensorflow_datasets"
NEEDS = {
    "davis": "pip install tensorflow importlib_resources",
    "youtube_vis": "put the files of the 2019 version into {folder}/downloads/manual (see "
    "https://www.tensorflow.org/datasets/catalog/youtube_vis) && "
    "pip install tensorflow importlib_resources apache-beam opencv-python-headless pycocotools",
}


class Clip(NamedTuple):
    """Where a clip lies and what is on it."""

    video: Video
    shard: str
    time: int  # when the file was last changed
    number: int  # of the record in the file
    frames: tuple[int, ...]  # labelled frames of the video
    visible: tuple[tuple[int, ...], ...]  # ids on each of them


def data_dir() -> Path:
    """Where tensorflow-datasets keeps what it prepared. No config key names it."""
    return Path(os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR).expanduser()


def full_name(dataset: str) -> str:
    """`davis/480p` for `davis` and so on.

    Raises:
        UserError: no such dataset is known here.
    """
    name, _, config = dataset.partition("/")
    config = config or DATASETS.get(name, ("",))[0]
    if config not in DATASETS.get(name, ()):
        known = ", ".join(f"{name}/{config}" for name in DATASETS for config in DATASETS[name])
        raise UserError(
            f"config.data.tfds.dataset is {dataset}, expected one of {known}: take one of these, "
            "or give other data as a folder"
        )
    return f"{name}/{config}"


def find_shards(dataset: str, split: str) -> list[Path]:
    """Files of a split of the newest version prepared in `data_dir()`, in order.

    Args:
        dataset: as `davis/480p`.
        split: `train` or `validation`.

    Raises:
        UserError: nothing is prepared there, or files are missing. Nothing is downloaded.
    """
    folder, name = data_dir(), dataset.partition("/")[0]
    pattern = f"*/{name}-{split}.{{}}-*-of-*"
    shards = sorted((folder / dataset).glob(pattern.format("array_record")), key=_version_and_name)
    shards = [s for s in shards if s.parent == shards[-1].parent]
    if not shards:
        found = "no prepared"
        if other := next((folder / dataset).glob(pattern.format("tfrecord")), None):
            found = f"tfrecord files ({other.parent}) instead of array_record files of"
        raise UserError(
            f"{found} {dataset} in {folder} (from the environment variable TFDS_DATA_DIR, else "
            f"{DEFAULT_DIR}) and none is downloaded here: give --config.data.root=DIR of a DAVIS "
            f"2017 folder, or set TFDS_DATA_DIR, or prepare it where there is a network by: "
            f"{NEEDS[name].format(folder=folder)} && "
            f'python -c "import tensorflow_datasets.video.{name}, tensorflow_datasets as tfds; '
            f"tfds.builder('{dataset}', data_dir='{folder}', file_format='array_record')"
            f'.download_and_prepare()"'
        )
    expected = int(shards[-1].name.rsplit("-of-", 1)[1])
    if len(shards) != expected:
        raise UserError(
            f"{shards[0].parent} has {len(shards)} of the {expected} files of {dataset} split "
            f"{split}: copy the missing ones or prepare it again"
        )
    return shards


def _version_and_name(path: Path) -> tuple[list[int], str]:
    return [int(n) if n.isdigit() else 0 for n in path.parent.name.split(".")], path.name


class PreparedSource:
    """Clips of a dataset as tensorflow-datasets stores them.

    Frames of a clip are those that have labels. In YouTube-VIS that is one in five, and in the
    configurations `full` only those that show an object: it does not name the others.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        faults: Faults | None = None,
        include: str = "",
        exclude: str = "",
    ) -> None:
        """Find and check the clips; what was found is remembered, see `scan.scan_files`.

        Args:
            dataset: `davis/480p`, `davis/full_resolution`, or `youtube_vis` with a configuration
                (`full` if none is named).
            split: `train` or `validation`; of YouTube-VIS only `train` has labels.
            faults: what to do about broken clips.
            include: text file with the names of the clips to take, one a line; empty: all.
            exclude: text file with the names of the clips to leave out.

        Raises:
            UserError: not prepared, or not readable; or a list is wrong.
        """
        faults, dataset = faults or Faults(), full_name(dataset)
        self.name = f"{dataset} {split}"
        shards = find_shards(dataset, split)
        labelled = dataset.startswith("davis") or dataset.endswith(LABELLED)
        look = functools.partial(look_at_shard, all_labelled=labelled)
        clips: list[Clip] = []
        seen_in: list[tuple[int, int]] = []  # frames and crowds of each clip
        total = 0
        scanned = scan_files(shards, look, where=dataset, faults=faults)
        for shard, found in zip(shards, scanned, strict=True):
            if isinstance(found, UserError):
                total += 1
                faults.add(found)
                continue
            for number, seen in enumerate(found):
                total += 1
                if "fault" in seen:
                    faults.add(UserError(seen["fault"]))
                    continue
                video = Video(seen["name"], len(seen["frames"]), *seen["size"])
                visible = tuple(tuple(ids) for ids in seen["visible"])
                place = (str(shard), changed(shard), number, tuple(seen["frames"]))
                clips.append(Clip(video, *place, visible))
                seen_in.append((seen["total"], seen["crowds"]))
        self.notes = faults.notes(total, self.name)
        taken = choose([clip.video.name for clip in clips], include, exclude, self.name)
        self._clips = [clips[i] for i in taken]
        frames, crowds = (sum(seen_in[i][k] for i in taken) for k in range(2))
        if left := frames - sum(len(clip.frames) for clip in self._clips):
            self.notes.append(f"{left:,} of {frames:,} frames left out: no labels")
        if crowds:
            self.notes.append(f"{crowds:,} tracks left out: crowds")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def video(self, index: int) -> Video:
        """Name, labelled frames and size of a clip."""
        return self._clips[index].video

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects on a labelled frame."""
        return self._clips[index].visible[frame]

    def _record(self, index: int) -> Record:
        clip = self._clips[index]
        return read_record(clip.shard, clip.time, clip.number)

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Decode labelled frames and masks.

        Raises:
            UserError: the record is broken.
        """
        clip, record = self._clips[index], self._record(index)
        size = (clip.video.height, clip.video.width)
        images = np.empty((len(frames), *size, 3), np.uint8)
        masks = np.zeros((len(frames), len(objects), *size), bool)
        try:
            for i, t in enumerate(frames):
                images[i] = decode_frame(record.frames[clip.frames[t]])
                if objects:
                    masks[i] = record_masks(record, clip.frames[t], objects, size)
        except (OSError, ValueError) as error:
            raise UserError(
                f"clip {clip.video.name} of {clip.shard} cannot be decoded ({error}): {MEND}"
            ) from error
        return images, masks

    def encoded(self, index: int, frame: int) -> bytes:
        """A labelled frame as it is stored, JPEG or PNG."""
        return self._record(index).frames[self._clips[index].frames[frame]]


def look_at_shard(shard: Path, all_labelled: bool) -> list[dict[str, Any]]:
    """What every clip of a file holds, or what is wrong with it; given to `scan_files`.

    Raises:
        UserError: the file is no array_record file.
    """
    found, time = [], changed(shard)
    for number in range(count_records(str(shard), time)):
        try:
            record = read_record(str(shard), time, number)
            found.append(look_at_record(record, all_labelled, str(shard)))
        except UserError as error:
            found.append({"fault": str(error)})
    return found
