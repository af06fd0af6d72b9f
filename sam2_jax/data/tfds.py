"""The copy of DAVIS that tensorflow-datasets prepares, read without TensorFlow.

A prepared split is a set of array_record files with one clip each record, random access. The
dataset's own reader decodes whole clips (90 frames for 8); here only the frames asked for are.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from grain.sources import ArrayRecordDataSource
from jaxtyping import UInt8

from sam2_jax.data.decode import decode_frame, decode_labels
from sam2_jax.data.sources import Video
from sam2_jax.types import UserError

DATASET = "davis/480p"
DEFAULT_DIR = "~/tensorflow_datasets"


def data_dir() -> Path:
    """Where tensorflow-datasets keeps what it prepared. No config key names it."""
    return Path(os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR).expanduser()


def find_shards(split: str) -> list[str]:
    """Files of a split of the newest version prepared in `data_dir()`, in order.

    Args:
        split: `train` or `validation`.

    Raises:
        UserError: nothing is prepared there, or files are missing. Nothing is downloaded.
    """
    folder = data_dir()
    pattern = f"*/davis-{split}.array_record-*-of-*"
    shards = sorted((folder / DATASET).glob(pattern), key=_version_and_name)
    shards = [s for s in shards if s.parent == shards[-1].parent]
    if not shards:
        raise UserError(
            f"no prepared {DATASET} in {folder} (from the environment variable TFDS_DATA_DIR, else "
            f"{DEFAULT_DIR}) and none is downloaded here: give --config.data.root=DIR of a DAVIS "
            f"2017 folder, or set TFDS_DATA_DIR, or prepare it where there is a network by: "
            f"pip install tensorflow importlib_resources && "
            f'python -c "import tensorflow_datasets.video.davis, tensorflow_datasets as tfds; '
            f"tfds.builder('{DATASET}', data_dir='{folder}', file_format='array_record')"
            f'.download_and_prepare()"'
        )
    expected = int(shards[-1].name.rsplit("-of-", 1)[1])
    if len(shards) != expected:
        raise UserError(
            f"{shards[0].parent} has {len(shards)} of the {expected} files of {DATASET} split "
            f"{split}: copy the missing ones or prepare it again"
        )
    return [str(shard) for shard in shards]


def _version_and_name(path: Path) -> tuple[list[int], str]:
    return [int(n) if n.isdigit() else 0 for n in path.parent.name.split(".")], path.name


class PreparedSource:
    """Clips of `davis/480p` as tensorflow-datasets stores them."""

    def __init__(self, split: str, num_frames: int = 1) -> None:
        """Find and check the clips.

        Args:
            split: `train` or `validation`.
            num_frames: the fewest frames a clip may have.

        Raises:
            UserError: not prepared, not readable, or a clip is shorter than `num_frames`.
        """
        self.name = f"{DATASET} {split}"
        self.notes: list[str] = []
        shards = find_shards(split)
        self._records: Any = ArrayRecordDataSource(shards)
        where = str(Path(shards[0]).parent)
        self._index: list[int] = []  # records of the clips that have an object
        self._videos: list[Video] = []
        for record in range(len(self._records)):
            try:
                name, frames, masks = self._clip(record)
                first = decode_frame(frames[0])
                seen = any(decode_labels(m).any() for m in masks[: len(masks) - num_frames + 1])
            except (OSError, ValueError, IndexError, RuntimeError, DecodeError) as error:
                raise UserError(
                    f"record {record} of {where} cannot be read ({error}): prepare it again"
                ) from error
            if not len(masks) == len(frames) >= num_frames:
                raise UserError(
                    f"clip {name} of {where} has {len(frames)} frames and {len(masks)} masks, "
                    f"expected at least config.data.num_frames={num_frames} of both: lower that"
                )
            if seen:
                self._index.append(record)
                self._videos.append(Video(name, len(frames), *first.shape[:2]))
        if not self._index:
            raise UserError(f"{where} has no clip with a visible object: prepare it again")
        if left := len(self._records) - len(self._index):
            self.notes.append(f"{left} of {len(self._records)} clips left out: no visible object")

    def _clip(self, record: int) -> tuple[str, Sequence[bytes], Sequence[bytes]]:
        """Name, encoded frames and encoded masks of one record."""
        # Imported here: it takes a second, which only users of this source should wait for.
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(  # pyright: ignore[reportAttributeAccessIssue]
            self._records[record]
        )
        feature = example.features.feature
        name = feature["metadata/video_name"].bytes_list.value[0].decode()
        frames = feature["video/frames"].bytes_list.value
        return name, frames, feature["video/segmentations"].bytes_list.value

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._index)

    def video(self, index: int) -> Video:
        """Name, length and size of a clip."""
        return self._videos[index]

    def read(
        self, index: int, frames: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w"]]:
        """Decode the frames asked for: RGB and label maps."""
        _, images, masks = self._clip(self._index[index])
        return (
            np.stack([decode_frame(images[t]) for t in frames]),
            np.stack([decode_labels(masks[t]) for t in frames]),
        )

    def labels(self, index: int, frames: Sequence[int]) -> UInt8[np.ndarray, "t h w"]:
        """Decode label maps alone."""
        masks = self._clip(self._index[index])[2]
        return np.stack([decode_labels(masks[t]) for t in frames])
