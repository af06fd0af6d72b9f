"""Signals while Python does not run; a workdir where there are no locks (more in test_loop.py)."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from sam2_jax import stopping
from sam2_jax.types import UserError


def without(monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stopping.fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys, number):
    without(monkeypatch, number)
    held = stopping.take(tmp_path)
    assert held
    held.close()
    assert (tmp_path / stopping.LOCK).read_text().startswith(f"{os.getpid()} on ")
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1
    assert warned.startswith(f"warning: the file system of --workdir={tmp_path} has no locks")


def test_a_workdir_that_cannot_be_locked(tmp_path, monkeypatch):
    without(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match="cannot be locked .Input/output error.: take another"):
        stopping.take(tmp_path)


def test_a_workdir_in_use(tmp_path, monkeypatch):
    without(monkeypatch, errno.EWOULDBLOCK)
    with pytest.raises(UserError, match="is in use by process unknown"):
        stopping.take(tmp_path)


BUSY = """
import hashlib
from sam2_jax import stopping
stopping.PATIENCE = 0.1
{begin}
print("busy", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})  # no handler of Python's is called within
print(request(1), flush=True)
"""
REQUEST = "request = stopping.Request()"


@contextlib.contextmanager
def started(code, **options):
    """A process that is busy, killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, **options
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"busy\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("begin", [REQUEST, "stopping.end_until_asked_otherwise()"])
def test_a_signal_while_python_does_not_run(begin, is_read):
    """As in a compilation, where all is saved: not after minutes, when that has ended."""
    reading, writing = os.pipe()
    code = BUSY.format(begin=begin, rounds=2**31 - 1)
    with started(code, stderr=writing) as process:
        os.close(writing)
        if not is_read:  # as of `tee` after Ctrl-C
            os.close(reading)
        time.sleep(1.0)  # it said so a moment before it was, when a handler might still be called
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == stopping.STOPPED
    if is_read:
        with open(reading) as told:
            assert told.read() == "asked to end (SIGTERM) while all is saved\n"


def test_a_signal_while_something_is_to_be_saved():
    code = BUSY.format(begin=f"{REQUEST}; request(0)", rounds=2**21)
    with started(code) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout and process.stdout.read() == b"True\n"
        assert process.wait(60) == 0


def test_what_follows_an_evaluation_is_not_saved():
    request = stopping.Request.__new__(stopping.Request)
    with pytest.raises(stopping.Interrupted), request.saved():
        assert request.is_saved
        raise stopping.Interrupted
    assert not request.is_saved
