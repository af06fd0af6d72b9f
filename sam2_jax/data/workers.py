"""What processes that read data owe the trainer: to leave its signals to it, and to end with it."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

POLL = 2.0  # seconds between a worker's looks at its trainer
# What all processes of a run get: from a terminal Ctrl-C, from a scheduler SIGTERM
OF_TRAINER = (signal.SIGINT, signal.SIGTERM)


def end_with_trainer() -> None:
    """Let a process that reads data end soon after its trainer, even one that was killed."""
    # Who started this process, which may be gone by now; os.getppid() would name its heir.
    trainer = multiprocessing.parent_process()
    if trainer is None:
        return

    def watch() -> None:
        while os.getppid() == trainer.pid:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin_worker(index: int, count: int) -> None:
    """Leave signals that all processes of a run get to the trainer, and end with it.

    The trainer still wants batches then: it lets the step end, and saves.
    """
    del index, count
    for number in OF_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    end_with_trainer()


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that this thread starts within it have those signals held back from their birth.

    `begin_worker` comes only once a worker has imported what it needs, seconds later.
    """
    resource_tracker.ensure_running()  # which lets signals through again once it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
