"""Prepared copies of DAVIS and YouTube-VIS, made here in the format that tensorflow-datasets
writes: records of YouTube-VIS by its own serialiser and from the features of its builder."""

import io
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from configs import davis
from sam2_jax.data.catalogue import make_parts
from sam2_jax.data.decode import decode_frame
from sam2_jax.data.sources import EncodedSource, Faults, keep_usable
from sam2_jax.data.tfds import PreparedSource
from sam2_jax.types import UserError

SIZE = (16, 24)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encode(array, kind):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def davis_example(name, frames, masks):
    from tensorflow_datasets.proto import tf_example_pb2

    item = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    feature = item.features.feature
    feature["metadata/video_name"].bytes_list.value.append(name.encode())
    feature["metadata/num_frames"].int64_list.value.append(len(frames))
    feature["video/frames"].bytes_list.value.extend(encode(f, "JPEG") for f in frames)
    feature["video/segmentations"].bytes_list.value.extend(encode(m, "PNG") for m in masks)
    return item.SerializeToString()


def write(folder, records, split="train", name="davis"):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        path = folder / f"{name}-{split}.array_record-{shard:05d}-of-00002"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records[shard::2]:
            writer.write(record)
        writer.close()


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), np.uint8)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for config in ("480p", "full_resolution"):
        records = []
        for name, label in (("ant", 1), ("bee", 2), ("none", 0)):
            masks = np.zeros((5, *SIZE), np.uint8)
            masks[:, 2:9, 3:8] = label * (np.arange(5) + 1)[:, None, None]
            masks[3:, 10:14] = 200 * (label > 0)
            records.append(davis_example(name + config[0], pixels(5), masks))
        write(tmp_path / "davis" / config / "2.1.0", records)
    return tmp_path


def test_reads_the_frames_asked_for(prepared):
    source = PreparedSource("davis/480p", "train")
    assert isinstance(source, EncodedSource) and source.notes == []
    assert [source.video(i) for i in range(len(source))] == [
        ("ant4", 5, *SIZE),
        ("none4", 5, *SIZE),
        ("bee4", 5, *SIZE),
    ]
    assert [source.objects(2, t) for t in range(5)] == [(2,), (4,), (6,), (8, 200), (10, 200)]
    frames, masks = source.read(2, [3, 0], [200, 8, 2])
    np.testing.assert_array_equal(frames[1], decode_frame(source.encoded(2, 0)))
    assert masks.sum((2, 3)).tolist() == [[4 * 24, 35, 0], [0, 0, 35]]
    assert masks[0, 1, 2:9, 3:8].all()
    assert source.read(2, [0], [])[1].shape == (1, 0, *SIZE)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(2, [3, 0], [200, 8, 2])[1], masks)
    left = keep_usable(source, 3)
    assert [left.video(i).name for i in range(len(left))] == ["ant4", "bee4"]
    assert PreparedSource("davis/full_resolution", "train").video(0).name == "antf"
    assert PreparedSource("davis", "train").name == "davis/480p train"


def test_lists_choose_clips(prepared, tmp_path):
    (tmp_path / "take.txt").write_text("ant4\nbee4\n")
    (tmp_path / "leave.txt").write_text("ant4\n")
    lists: Any = {"include": str(tmp_path / "take.txt"), "exclude": str(tmp_path / "leave.txt")}
    source = PreparedSource("davis/480p", "train", **lists)
    assert [source.video(i).name for i in range(len(source))] == ["bee4"]
    assert source.objects(0, 0) == (2,) and not source.notes
    config = davis.get_config("nano")
    config.data.num_frames, config.data.exclude = 2, lists["exclude"]
    (part,) = make_parts(config)
    assert [part.source.video(i).name for i in range(len(part.source))] == ["bee4"]
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        PreparedSource("davis/480p", "train", include="nowhere.txt")


def test_newest_version_is_read_and_what_changed_too(prepared):
    black, white = [np.zeros((8, 8, 3), np.uint8)] * 2, [np.ones((8, 8), np.uint8)] * 2
    folder = prepared / "davis/480p/2.10.0"
    write(folder, [davis_example("new", black, white)])
    source = PreparedSource("davis/480p", "train")
    assert source.video(0).name == "new" and source.read(0, [1], [1])[1].all()
    write(folder, [davis_example("newer", black, [2 * mask for mask in white])])
    source = PreparedSource("davis/480p", "train")
    assert source.video(0).name == "newer" and source.read(0, [1], [2])[1].all()


def test_not_prepared_says_both_ways_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        PreparedSource("davis/480p", "train")
    for part in (
        "--config.data.root=DIR",
        "TFDS_DATA_DIR",
        "~/tensorflow_datasets",
        "pip install tensorflow importlib_resources",
        str(tmp_path),
    ):
        assert part in str(error.value)
    # The command finds the dataset; it is not run to its end, which downloads.
    code = re.search(r'python -c "(.*)\.download_and_prepare\(\)"', str(error.value))
    assert code
    subprocess.run([sys.executable, "-c", code[1]], check=True, timeout=60)
    with pytest.raises(UserError, match="youtube_vis/full .*apache-beam.*video.youtube_vis"):
        PreparedSource("youtube_vis", "train")
    for name in ("mnist", "davis/1080p", "youtube_vis/../davis", ""):
        with pytest.raises(UserError, match="config.data.tfds.dataset is .* davis/480p"):
            PreparedSource(name, "train")
    folder = tmp_path / "davis/480p/2.1.0"
    folder.mkdir(parents=True)
    (folder / "davis-train.tfrecord-00000-of-00001").touch()
    with pytest.raises(UserError, match="tfrecord files .* instead of array_record"):
        PreparedSource("davis/480p", "train")


def test_missing_shard_and_broken_records(prepared):
    folder = prepared / "davis/480p/2.1.0"
    (folder / "davis-train.array_record-00000-of-00002").unlink()
    with pytest.raises(UserError, match="1 of the 2 files"):
        PreparedSource("davis/480p", "train")
    images = pixels(2)
    good = davis_example("good", images, images[..., 0] > 99)
    bad = {
        "record 0 .* cannot be read": b"nonsense",
        "clip bad .*2 frames and 1 masks": davis_example("bad", images, images[:1, ..., 0] // 2),
        r"clip bad .*a mask of size \(8, 24\)": davis_example(
            "bad", images, images[:, :8, :, 0] // 2
        ),
        "clip bad .*a mask|clip bad .*expected an indexed": davis_example("bad", images, images),
        "clip bad .*a frame is missing": davis_example("bad", [], []),
    }
    for message, record in bad.items():
        write(folder, [record, good])
        with pytest.raises(UserError, match=message):
            PreparedSource("davis/480p", "train")
        source = PreparedSource("davis/480p", "train", Faults("skip", 0.5))
        assert [source.video(i).name for i in range(len(source))] == ["good"]
        assert "1 of 2 clips" in source.notes[0]
    write(folder, [good, good])
    shard = folder / "davis-train.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="00001-of-00002"):
        PreparedSource("davis/480p", "train")


@pytest.fixture
def serialise(monkeypatch):
    """Serialise a clip by the features of tensorflow_datasets/video/youtube_vis.

    A Video is a sequence of images, under which name it needs no TensorFlow to be declared.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer
    from tensorflow_datasets.core.features import feature as feature_lib

    def video(*shape):
        return tfds.features.Sequence(tfds.features.Image(shape=shape))

    names = tfds.core.tfds_path("video/youtube_vis/labels.txt")
    features = tfds.features.FeaturesDict(
        {
            "video": video(None, None, 3),
            "metadata": {
                "height": np.int32,
                "width": np.int32,
                "num_frames": np.int32,
                "video_name": np.str_,
            },
            "tracks": tfds.features.Sequence(
                {
                    "bboxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
                    "segmentations": video(None, None, 1),
                    "category": tfds.features.ClassLabel(names_file=names),
                    "is_crowd": np.bool_,
                    "areas": tfds.features.Sequence(np.float32),
                    "frames": tfds.features.Sequence(np.int32),
                }
            ),
        }
    )
    # Else the serialiser asks TensorFlow for the name of a type that it has already.
    monkeypatch.setattr(feature_lib.TensorInfo, "dtype", property(lambda info: info.np_dtype))
    specs: Any = features.get_serialized_info()
    serialiser = example_serializer.ExampleSerializer(specs)

    def serialise(name, frames, tracks):
        box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        example = {
            "video": [encode(f, "JPEG") for f in frames],
            "metadata": {
                "height": SIZE[0],
                "width": SIZE[1],
                "num_frames": len(frames),
                "video_name": name,
            },
            "tracks": [
                {
                    "bboxes": [box] * len(masks),
                    "segmentations": [encode(m.astype(np.uint8), "PNG") for m in masks.values()],
                    "category": 3,
                    "is_crowd": crowd,
                    "areas": [float(m.sum()) for m in masks.values()],
                    "frames": list(masks),
                }
                for crowd, masks in tracks
            ],
        }
        return serialiser.serialize_example(features.encode_example(example))

    return serialise


def track_mask(k, t):
    mask = np.zeros(SIZE, bool)
    mask[4 * k : 4 * k + 3, t : t + 6] = True
    return mask


@pytest.fixture
def youtube(tmp_path, monkeypatch, serialise):
    """Of 11 frames those at 0, 5 and 10 are labelled; the second track is a crowd."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    tracks = [
        (False, {t: track_mask(0, t) for t in (0, 5, 10)}),
        (True, {t: track_mask(1, t) for t in (0,)}),
        (False, {t: track_mask(2, t) for t in (5, 10)}),
        (False, {}),
        (False, {0: np.zeros(SIZE, bool)}),
    ]
    for config in ("full", "only_frames_with_labels"):
        records = [serialise("tub", pixels(11), tracks), serialise("none", pixels(2), [])]
        write(tmp_path / "youtube_vis" / config / "1.0.0", records, name="youtube_vis")
    return tmp_path


def test_youtube_vis(youtube):
    source = PreparedSource("youtube_vis", "train")
    assert source.name == "youtube_vis/full train" and isinstance(source, EncodedSource)
    assert [source.video(i) for i in range(2)] == [("tub", 3, *SIZE), ("none", 0, *SIZE)]
    assert source.notes == ["10 of 13 frames left out: no labels", "1 tracks left out: crowds"]
    assert [source.objects(0, t) for t in range(3)] == [(1,), (1, 3), (1, 3)]
    frames, masks = source.read(0, [2, 0, 1], [3, 1, 4, 9])
    for i, t in enumerate((10, 0, 5)):
        np.testing.assert_array_equal(frames[i], decode_frame(encode(pixels(11)[t], "JPEG")))
        np.testing.assert_array_equal(masks[i, 0], track_mask(2, t) & (t > 0))
        np.testing.assert_array_equal(masks[i, 1], track_mask(0, t))
    assert not masks[:, 2:].any()
    assert source.encoded(0, 1) == encode(pixels(11)[5], "JPEG")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(0, [2, 0, 1], [3, 1, 4, 9])[1], masks)
    left = keep_usable(source, 2)
    assert [left.video(i).name for i in range(len(left))] == ["tub"]
    # Where only labelled frames are stored, those without an object are known to be.
    labelled = PreparedSource("youtube_vis/only_frames_with_labels", "train")
    assert labelled.video(0).num_frames == 11 and labelled.objects(0, 3) == ()
    assert labelled.objects(0, 5) == (1, 3)


def test_three_hundred_tracks(youtube, serialise):
    masks = np.random.default_rng(0).random((300, *SIZE)) < 0.1
    record = serialise("many", pixels(1), [(False, {0: mask}) for mask in masks])
    write(youtube / "youtube_vis/full/1.0.0", [record], name="youtube_vis")
    source = PreparedSource("youtube_vis", "train")
    assert source.objects(0, 0) == tuple(range(1, 301))
    np.testing.assert_array_equal(source.read(0, [0], [256, 300])[1][0], masks[[255, 299]])


def test_broken_tracks(youtube, serialise):
    from tensorflow_datasets.proto import tf_example_pb2

    folder = youtube / "youtube_vis/full/1.0.0"
    write(folder, [serialise("bad", pixels(2), [(False, {3: track_mask(0, 0)})])], "train",
          "youtube_vis")  # fmt: skip
    with pytest.raises(UserError, match="clip bad .*a mask on frame 3 of 2"):
        PreparedSource("youtube_vis", "train")
    whole = serialise("bad", pixels(2), [(False, {0: track_mask(0, 0), 1: track_mask(0, 1)})])
    for key in ("tracks/frames/ragged_flat_values", "tracks/areas/ragged_row_lengths_0"):
        item = tf_example_pb2.Example.FromString(whole)  # pyright: ignore
        values = item.features.feature[key].int64_list.value
        values[:] = [*values, 1]
        write(folder, [item.SerializeToString()], name="youtube_vis")
        with pytest.raises(UserError, match="record 0 of .* cannot be read"):
            PreparedSource("youtube_vis", "train")
    write(folder, [serialise("bad", pixels(2), [(False, {0: np.ones((8, 8))})])], "train",
          "youtube_vis")  # fmt: skip
    with pytest.raises(UserError, match=r"clip bad .*a mask of size \(8, 8\)"):
        PreparedSource("youtube_vis", "train").read(0, [0], [1])
