"""Finding the other processes of a run, and joining them."""

import os

import jax
from jax._src.clusters import GceTpuCluster  # JAX has no public way to ask before connecting

from sam2_jax.types import UserError

# Set by launchers to the number of processes. Not all versions tell JAX where process 0 is.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


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
        UserError: one is given without the others, or JAX does not find the other processes.
    """
    if coordinator:
        if processes is None or process is None:
            raise UserError("--coordinator_address needs --num_processes and --process_id too")
        jax.distributed.initialize(coordinator, processes, process)
    elif processes is not None or process is not None:
        raise UserError("--num_processes and --process_id need --coordinator_address=HOST:PORT")
    elif has_peers():
        try:
            jax.distributed.initialize()
        except ValueError as e:
            raise UserError(
                f"there are other processes, but JAX does not find them ({e}): give "
                "--coordinator_address, --num_processes and --process_id"
            ) from e
