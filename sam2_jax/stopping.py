"""Being asked to end, and not being two: signals of schedulers, and the lock of a workdir."""

import errno
import fcntl
import os
import pathlib
import signal
import sys
from types import FrameType
from typing import IO

import jax
from jax.experimental import multihost_utils

from sam2_jax.types import UserError

STOPPED = 75  # exit status of a run that saved and may be started again (EX_TEMPFAIL)
LOCK = ".lock"
# Of file systems without locks: Lustre mounted without flock, some NFS
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Interrupted(Exception):
    """An evaluation was left for a request to end."""


def end_until_asked_otherwise() -> None:
    """SIGTERM and SIGINT end this process as one that may be started again, until a `Request`.

    Before the first step there is nothing to save.
    """

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        print(f"asked to end ({name}) before the first step", file=sys.stderr)
        sys.exit(STOPPED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


class Request:
    """Notes SIGTERM (a scheduler's warning) and SIGINT, to be asked about after every step.

    The second signal of a kind ends the process at once. With several processes JAX's own
    preemption service watches for SIGTERM, and settles with the others after which step all stop.
    """

    def __init__(self):
        self._asked = False
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises `Interrupted` if this process alone was asked; several would have to agree."""
        if self._asked:
            raise Interrupted

    def __call__(self, step: int) -> bool:
        """Whether to save and end after this step; the same answer on all processes."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)


def take(workdir: pathlib.Path) -> IO[str] | None:
    """Makes a workdir this run's own until the file returned is closed, or the process dies.

    Of several processes the first one does it for all. Where the file system has no locks it warns
    on stderr and goes on without.

    Raises:
        UserError: another process has it, or it cannot be written to or locked.
    """
    if jax.process_index():
        return None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written to ({error.strerror}): take another, or mend "
            "its permissions"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"--workdir={workdir} is in use by process {owner}: wait for it, end it, or take "
            "another workdir"
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            file.close()
            raise UserError(
                f"--workdir={workdir} cannot be locked ({error.strerror}): take another workdir"
            ) from error
        print(
            f"warning: the file system of --workdir={workdir} has no locks ({error.strerror}): "
            "see to it that no second run is started there",
            file=sys.stderr,
        )
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file
