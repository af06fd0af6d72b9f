"""Being asked to end, and not being two: signals of schedulers, and the lock of a workdir."""

import contextlib
import errno
import fcntl
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO

import jax
from jax.experimental import multihost_utils

from sam2_jax.types import UserError

STOPPED = 75  # exit status of a run that saved and may be started again (EX_TEMPFAIL)
LOCK = ".lock"
PATIENCE = 3.0  # seconds in which a signal's handler may begin
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
        tell(number, "before the first step")
        sys.exit(STOPPED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    watch(lambda: True)


def tell(number: int, when: str) -> None:
    """Says on stderr that this process ends for a signal; who read that may have ended, too."""
    with contextlib.suppress(OSError):
        print(f"asked to end ({signal.Signals(number).name}) {when}", file=sys.stderr, flush=True)


_may_end: Callable[[], bool] | None = None  # of the last call of `watch`


def watch(may_end: Callable[[], bool]) -> None:
    """From now on SIGTERM and SIGINT end this process wherever it is, if `may_end` says so then.

    For Python calls a handler between two of its own instructions only: while XLA compiles, which
    takes minutes, never, and schedulers do not wait for so long. To be called in the main thread;
    takes the place of an earlier call.
    """
    global _may_end
    is_watched, _may_end = _may_end is not None, may_end
    if is_watched:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number in (signal.SIGTERM, signal.SIGINT):
                time.sleep(PATIENCE)
                if _may_end and _may_end():
                    tell(number, "while all is saved")
                    os._exit(STOPPED)

    threading.Thread(target=wait, daemon=True).start()


class Request:
    """Notes SIGTERM (a scheduler's warning) and SIGINT, to be asked about after every step.

    The second signal of a kind ends the process at once. So does the first, but for a few seconds,
    while `is_saved`: from the start, when nothing was trained yet, to the end of a step, and within
    `saved`. With several processes JAX's own preemption service watches for SIGTERM, and settles
    with the others after which step all stop.
    """

    def __init__(self):
        self._asked = False
        self.is_saved = True
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)
            watch(lambda: self.is_saved)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Within it nothing is done that is not made up for at the next start."""
        self.is_saved = True
        try:
            yield
        finally:
            self.is_saved = False

    def check(self) -> None:
        """Raises `Interrupted` if this process alone was asked; several would have to agree."""
        if self._asked:
            raise Interrupted

    def __call__(self, step: int) -> bool:
        """Whether to save and end after this step; the same answer on all processes."""
        self.is_saved = False
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
