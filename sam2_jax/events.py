"""TensorBoard's event files, written where the loop is.

tensorboardX's SummaryWriter writes in a thread, which ends without a word where the disk is full:
the next rows would then wait for ever to be taken.
"""

import os
import pathlib
import socket
import time
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.record_writer import RecordWriter

FLUSHED = 60  # seconds after which what was written is to be seen


class Events:
    """A new event file of a folder; all that writes raises `OSError` where it cannot."""

    def __init__(self, folder: pathlib.Path, step: int):
        """Goes on after `step`: later events of other files there are no longer shown."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(str(folder / name))
        self._due = time.monotonic() + FLUSHED
        self._write(file_version="brain.Event:2")
        # Given at step 0, too: a run may have died before its first checkpoint.
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of the curve `tag`."""
        self._write(step, summary=summary.scalar(tag, value))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """A picture, uint8 of shape (h, w, 3)."""
        self._write(step, summary=summary.image(tag, pixels, dataformats="HWC"))

    def flush(self) -> None:
        """Returns once all is on disk."""
        self._writer.flush()
        self._due = time.monotonic() + FLUSHED

    def close(self) -> None:
        """Closes the file, also where the rest of it cannot be written."""
        self._writer.close()

    def _write(self, step: int = 0, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())
        if time.monotonic() >= self._due:
            self.flush()
