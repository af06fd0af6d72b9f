"""The other processes of a run: finding them, agreeing with them, and not outliving them."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src.clusters import GceTpuCluster  # JAX has no public way to ask before connecting
from jax.experimental import multihost_utils

from sam2_jax.types import UserError, fail

# Set by launchers to the number of processes. Not all versions tell JAX where process 0 is.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Seconds without a sign of life after which a process is taken for dead, and all others end too:
# a collective operation on an accelerator would wait for it for ever.
SILENCE = 60
ARRIVAL = 300  # seconds that a process waits at the start for all others to be there


def has_peers() -> bool:
    """Whether a launcher, GKE or the metadata of a Cloud TPU VM tells of other processes."""
    if any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS):
        return True
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    try:
        return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1
    except OSError as e:
        raise UserError(
            f"cannot ask Cloud TPU's metadata server for other hosts ({type(e).__name__}): set "
            "TPU_SKIP_MDS_QUERY=1 if there are none, else give --coordinator_address"
        ) from e


def connect(coordinator: str, processes: int | None, process: int | None) -> None:
    """Joins the other processes of the run, if it has any.

    Args:
        coordinator: HOST:PORT of process 0; empty: found by JAX, if a launcher tells of others.
        processes, process: their number, and which one this is; only with `coordinator`.

    Raises:
        UserError: one is given without the others or cannot be, or JAX does not find the other
            processes.

    Where others do not come, JAX ends this process after `ARRIVAL` seconds, which is said first.
    """
    limits: dict[str, Any] = {
        "heartbeat_timeout_seconds": SILENCE,
        "initialization_timeout": ARRIVAL,
    }
    if coordinator:
        if processes is None or process is None:
            raise UserError("--coordinator_address needs --num_processes and --process_id too")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator_address={coordinator} is not HOST:PORT")
        if processes < 1:
            raise UserError(f"--num_processes={processes} must be at least 1")
        if not 0 <= process < processes:
            raise UserError(
                f"--process_id={process} is not one of --num_processes={processes}: expected 0 to "
                f"{processes - 1}"
            )
        if processes > 1:
            print(
                f"process {process} of {processes}: waiting for the others at {coordinator}, for "
                f"{ARRIVAL} s at most; if one does not come, its own log says why",
                file=sys.stderr,
                flush=True,
            )
        jax.distributed.initialize(coordinator, processes, process, **limits)
    elif processes is not None or process is not None:
        raise UserError("--num_processes and --process_id need --coordinator_address=HOST:PORT")
    elif has_peers():
        try:
            jax.distributed.initialize(**limits)
        except ValueError as e:
            raise UserError(
                f"there are other processes, but JAX does not find them ({e}): give "
                "--coordinator_address, --num_processes and --process_id"
            ) from e


def gather_text(text: str) -> list[str]:
    """The text that each process calls this with, in their order; the same on each of them."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(own)]))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [x[:size].tobytes().decode() for x, size in zip(texts, sizes, strict=True)]


def of_first(value: int) -> int:
    """The number that process 0 calls this with; to be called on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agree(values: Mapping[str, Any], advice: str) -> None:
    """Do all processes have the same values by these names? To be called on each of them.

    Raises:
        UserError: they do not; names what differs between two, and ends with `advice`.
    """
    pairs = sorted(values.items())
    texts = [f"{name}={value}".replace("\n", "\\n") for name, value in pairs]
    for i, other in enumerate(gather_text("\n".join(texts))):
        lines = other.split("\n")
        if lines != texts:
            theirs = ", ".join(sorted({*lines} - {*texts})) or "nothing"
            mine = ", ".join(sorted({*texts} - {*lines})) or "nothing"
            me = jax.process_index()
            raise UserError(f"process {i} has {theirs} where process {me} has {mine}: {advice}")


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error inside ends this process at once, if it is one of several.

    Python would first wait at its exit, for minutes, for all others to reach theirs. Without it the
    others end as soon as they miss it: those on CPUs at the next sum over devices, those on
    accelerators within `SILENCE` seconds.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            status = fail(error)
        else:
            traceback.print_exc()
            status = 1
        print(
            f"process {jax.process_index()} of {jax.process_count()} ends here, the others within "
            f"{SILENCE} s; the cause is in the log of the first to end. Started again, all "
            "processes go on from the last checkpoint",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
