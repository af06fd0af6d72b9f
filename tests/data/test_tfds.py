"""A prepared copy of DAVIS, made here in the format that tensorflow-datasets writes."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from sam2_jax.data.tfds import PreparedSource
from sam2_jax.types import UserError


def encode(array, kind):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def example(name, frames, masks):
    from tensorflow_datasets.proto import tf_example_pb2

    item = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    feature = item.features.feature
    feature["metadata/video_name"].bytes_list.value.append(name.encode())
    feature["metadata/num_frames"].int64_list.value.append(len(frames))
    feature["video/frames"].bytes_list.value.extend(encode(f, "JPEG") for f in frames)
    feature["video/segmentations"].bytes_list.value.extend(encode(m, "PNG") for m in masks)
    return item.SerializeToString()


def write(folder, records, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        path = folder / f"davis-{split}.array_record-{shard:05d}-of-00002"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records[shard::2]:
            writer.write(record)
        writer.close()


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    rng = np.random.default_rng(0)
    records = []
    for name, label in (("ant", 1), ("bee", 2), ("none", 0)):
        frames = rng.integers(0, 256, (5, 16, 24, 3), np.uint8)
        masks = np.zeros((5, 16, 24), np.uint8)
        masks[:, 2:9, 3:8] = label * (np.arange(5) + 1)[:, None, None]
        records.append(example(name, frames, masks))
    write(tmp_path / "davis/480p/2.1.0", records)
    return tmp_path


def test_reads_the_frames_asked_for(prepared):
    source = PreparedSource("train", 3)
    assert [source.video(i) for i in range(len(source))] == [
        ("ant", 5, 16, 24),
        ("bee", 5, 16, 24),
    ]
    assert source.notes == ["1 of 3 clips left out: no visible object"]
    frames, labels = source.read(1, [3, 0])
    assert frames.shape == (2, 16, 24, 3)
    assert labels.max((1, 2)).tolist() == [8, 2] and labels[0, 2:9, 3:8].all()
    np.testing.assert_array_equal(source.labels(1, [3, 0]), labels)


def test_newest_version_is_read(prepared):
    write(prepared / "davis/480p/2.10.0", [example("new", [np.zeros((8, 8, 3), np.uint8)] * 2,
                                                   [np.ones((8, 8), np.uint8)] * 2)])  # fmt: skip
    assert PreparedSource("train").video(0).name == "new"


def test_not_prepared_says_both_ways_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        PreparedSource("train")
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


def test_missing_shard_broken_record_and_short_clip(prepared):
    with pytest.raises(UserError, match="ant .* 5 frames .* config.data.num_frames=6"):
        PreparedSource("train", 6)
    folder = prepared / "davis/480p/2.1.0"
    (folder / "davis-train.array_record-00000-of-00002").unlink()
    with pytest.raises(UserError, match="1 of the 2 files"):
        PreparedSource("train")
    write(folder, [b"nonsense"])
    with pytest.raises(UserError, match="record 0 .* cannot be read"):
        PreparedSource("train")
