"""A run in small, one of several processes: sums over all devices, stops when one is asked to.

    python -m tests.peers HOST:PORT PROCESSES PROCESS SILENCE

Prints its steps; takes seconds to start, where a model takes minutes. SILENCE takes the place of
cluster.SILENCE, so that tests need not wait for as long.
"""

import sys
import time

import jax
from jax.experimental import multihost_utils

from sam2_jax import cluster, stopping

STEPS = 400


def main(address: str, processes: str, process: str, silence: str) -> int:
    cluster.SILENCE = int(silence)
    cluster.connect(address, int(processes), int(process))
    with cluster.ending_together():
        request = stopping.Request()
        for step in range(1, STEPS + 1):
            multihost_utils.process_allgather(jax.numpy.float32(step))
            print(step, flush=True)
            if request(step):
                return stopping.STOPPED
            time.sleep(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
