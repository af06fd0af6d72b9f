"""Tasks on several processes, of which each may be the last to succeed."""

import multiprocessing
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sam2_jax.data.workers import end_with_trainer
from sam2_jax.types import UserError

_task: Callable[..., Any] | None = None  # of a worker process


def run_parallel(
    task: Callable[..., Any], todo: Mapping[int, tuple], workers: int
) -> Generator[tuple[int, Any]]:
    """`(key, task(*arguments))` of every entry, in the order in which they are finished.

    Args:
        task: must pickle, and what it is bound to does so once for each process, not each call.
        todo: arguments by key.
        workers: processes; 1: everything happens in this one.

    Raises:
        UserError: a task raised it; those that were running then are finished before. Or a
            process was killed.
    """
    if workers <= 1 or len(todo) <= 1:
        for key, arguments in todo.items():
            yield key, task(*arguments)
        return
    # Not forked: threads of JAX may hold locks that nobody would ever release in the copy.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=spawn, initializer=_start, initargs=(task,)
    )
    failed: UserError | None = None
    try:
        futures = {pool.submit(_run, arguments): key for key, arguments in todo.items()}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            try:
                result = future.result()
            except UserError as error:
                failed = failed or error
                for other in futures:
                    other.cancel()
                continue
            yield futures[future], result
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: start again with fewer "
            "--workers; what is finished is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise failed


def _start(task: Callable[..., Any]) -> None:
    global _task
    _task = task
    end_with_trainer()  # where this one is killed, its processes end too


def _run(arguments: tuple) -> Any:
    assert _task
    return _task(*arguments)
