"""Clips as tensorflow-datasets writes them: one serialised Example a clip, read without TensorFlow.

    davis         video/frames, video/segmentations: encoded frames and label maps, one each
    youtube_vis   video: encoded frames; tracks/...: of every object the indices of its frames, and
                  its mask on each of them as a PNG

Sequences of sequences, which the tracks have, are stored flat, `.../ragged_flat_values`, with
their lengths, `.../ragged_row_lengths_0` (tensorflow_datasets/core/example_serializer.py;
the features are those of tensorflow_datasets/video/davis and video/youtube_vis).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from grain.sources import ArrayRecordDataSource
from jaxtyping import Bool

from sam2_jax.data.decode import decode_labels, masks_of, visible_ids
from sam2_jax.data.headers import frame_fault, parse_header
from sam2_jax.types import UserError

KEPT_RECORDS = 2  # parsed, some megabytes each: evaluation asks for one frame of a clip at a time
KEPT_READERS = 8
BROKEN = (OSError, ValueError, IndexError, KeyError, RuntimeError, DecodeError)
MEND = "prepare it again"


class Track(NamedTuple):
    """One object of youtube_vis: the frames it is on, and where it has a PNG for each."""

    id: int
    frames: list[int]
    areas: list[float]  # pixels
    masks: Sequence[bytes]
    is_crowd: bool


class Record(NamedTuple):
    """One clip, encoded. It has either label maps or tracks."""

    name: str
    frames: Sequence[bytes]
    labels: Sequence[bytes]
    tracks: list[Track]


@functools.lru_cache(maxsize=KEPT_READERS)
def _reader(shard: str, time: int) -> Any:
    del time  # part of the key
    return ArrayRecordDataSource([shard])


def count_records(shard: str, time: int) -> int:
    """Clips in a file that was last changed at `time`.

    Raises:
        UserError: it is no array_record file.
    """
    try:
        return len(_reader(shard, time))
    except BROKEN as error:
        raise UserError(f"{shard} cannot be read ({error}): {MEND}") from error


@functools.lru_cache(maxsize=KEPT_RECORDS)
def read_record(shard: str, time: int, number: int) -> Record:
    """Parse one clip.

    Raises:
        UserError: it cannot be read, or has other features.
    """
    # Imported here: it takes a second, which only users of this source should wait for.
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        example = tf_example_pb2.Example.FromString(  # pyright: ignore[reportAttributeAccessIssue]
            _reader(shard, time)[number]
        )
        feature = dict(example.features.feature)
        name = feature["metadata/video_name"].bytes_list.value[0].decode()
        if "video" not in feature:
            frames = feature["video/frames"].bytes_list.value
            return Record(name, frames, feature["video/segmentations"].bytes_list.value, [])
        return Record(name, feature["video"].bytes_list.value, [], _tracks(feature))
    except BROKEN as error:
        raise UserError(
            f"record {number} of {shard} cannot be read ({type(error).__name__} {error}): {MEND}"
        ) from error


def _tracks(feature: dict[str, Any]) -> list[Track]:
    def nested(name: str, kind: str) -> list[Any]:
        flat = getattr(feature[f"tracks/{name}/ragged_flat_values"], kind).value
        lengths = feature[f"tracks/{name}/ragged_row_lengths_0"].int64_list.value
        ends = np.cumsum([0, *lengths]).tolist()
        if ends[-1] != len(flat):
            raise ValueError(f"{name} of tracks have {len(flat)} entries, expected {ends[-1]}")
        return [flat[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    columns = zip(
        nested("frames", "int64_list"),
        nested("areas", "float_list"),
        nested("segmentations", "bytes_list"),
        feature["tracks/is_crowd"].int64_list.value,
        strict=True,
    )
    tracks = []
    for k, (frames, areas, masks, is_crowd) in enumerate(columns, 1):
        if not len(frames) == len(areas) == len(masks):
            raise ValueError(f"track {k} has {len(frames)} frames and {len(masks)} masks")
        tracks.append(Track(k, list(frames), list(areas), masks, bool(is_crowd)))
    return tracks


def look_at_record(record: Record, all_labelled: bool, where: str) -> dict[str, Any]:
    """Size, labelled frames and who is seen on each of them, as JSON can hold it.

    Label maps are all decoded for that, masks of tracks are not. Crowds are no objects.

    Args:
        record: one clip.
        all_labelled: every frame is labelled; else those that any track is on. Of frames between
            two labelled ones, youtube_vis does not say who is there.
        where: what it is a clip of, for messages.

    Raises:
        UserError: frames and masks do not fit each other, or are broken.
    """
    where = f"clip {record.name} of {where}"
    try:
        headers = [parse_header(data) for data in record.frames]
        faults = [frame_fault(h) if h else "is cut short" for h in headers]
        if fault := next(filter(None, faults), None if headers else "is missing"):
            raise ValueError(f"a frame {fault}")
        sizes = {(h.height, h.width) for h in headers if h}
        if len(sizes) > 1:
            raise ValueError(f"frames of sizes {sorted(sizes)}")
        (size,) = sizes
        count = len(headers)
        if record.tracks or not record.labels:
            tracks = [track for track in record.tracks if not track.is_crowd]
            seen: list[list[int]] = [[] for _ in headers]
            for track in tracks:
                for t, area in zip(track.frames, track.areas, strict=True):
                    if not 0 <= t < count:
                        raise ValueError(f"a mask on frame {t} of {count}")
                    if area > 0:
                        seen[t].append(track.id)
            labelled = {t for track in record.tracks for t in track.frames}
            kept = list(range(count)) if all_labelled else sorted(labelled)
        else:
            if len(record.labels) != count:
                raise ValueError(f"{count} frames and {len(record.labels)} masks")
            maps = [decode_labels(data) for data in record.labels]
            if strange := next((m.shape for m in maps if m.shape != size), None):
                raise ValueError(f"a mask of size {strange} on frames of size {size}")
            seen, kept = [list(visible_ids(m)) for m in maps], list(range(count))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}): {MEND}") from error
    crowds = sum(track.is_crowd for track in record.tracks)
    return {
        "name": record.name,
        "size": list(size),
        "total": count,
        "frames": kept,
        "visible": [seen[t] for t in kept],
        "crowds": crowds,
    }


def record_masks(
    record: Record, frame: int, objects: Sequence[int], size: tuple[int, int]
) -> Bool[np.ndarray, "o h w"]:
    """Masks of some objects on one frame of the video; empty where they are absent.

    Raises:
        OSError, ValueError: a mask is broken or of another size than `size`, [h, w].
    """
    if record.labels:
        labels = decode_labels(record.labels[frame])
        if labels.shape != size:
            raise ValueError(f"a mask of size {labels.shape} on frames of size {size}")
        return masks_of(labels, objects)
    masks = np.zeros((len(objects), *size), bool)
    for mask, k in zip(masks, objects, strict=True):
        if k > len(record.tracks) or frame not in (track := record.tracks[k - 1]).frames:
            continue
        found = decode_labels(track.masks[track.frames.index(frame)])
        if found.shape != size:
            raise ValueError(f"a mask of size {found.shape} on frames of size {size}")
        mask[:] = found > 0
    return masks
