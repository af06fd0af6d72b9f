"""TensorBoard's files: what is in them, and a disk that is full."""

import errno
import pathlib

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from sam2_jax import events


def read(file: pathlib.Path) -> list:
    data, found = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_what_is_written_can_be_read(tmp_path):
    writer = events.Events(tmp_path / "tensorboard", 6)
    writer.scalar("train/loss", 0.5, 7)
    writer.image("eval/overlay", np.zeros((2, 3, 3), np.uint8), 8)
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    version, start, scalar, image = read(file)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 7)
    (value,) = scalar.summary.value
    assert (value.tag, value.simple_value, scalar.step) == ("train/loss", 0.5, 7)
    (value,) = image.summary.value
    assert (value.tag, value.image.height, value.image.width) == ("eval/overlay", 2, 3)


def test_what_is_written_is_soon_to_be_seen(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    writer = events.Events(tmp_path, 0)
    (file,) = tmp_path.iterdir()
    writer.scalar("a", 1.0, 1)
    assert len(read(file)) < 3
    now[0] = events.FLUSHED
    writer.scalar("a", 2.0, 2)
    assert len(read(file)) == 4
    writer.close()


def test_a_full_disk_is_an_error_at_once_and_the_file_is_closed(tmp_path, monkeypatch):
    full = open("/dev/full", "wb")  # noqa: SIM115
    monkeypatch.setattr(record_writer, "open_file", lambda path: full)
    writer = events.Events(tmp_path, 0)
    with pytest.raises(OSError) as error:
        for step in range(10_000):
            writer.scalar("a", 1.0, step)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        writer.close()
    assert full.closed
