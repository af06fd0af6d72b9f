"""The lock of a workdir where there are no locks; more of it in test_loop.py."""

import errno
import os

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
