"""Batches from a position of a stream on: threads or worker processes that make them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from sam2_jax.data.workers import begin_worker, starting_workers
from sam2_jax.types import Batch, UserError

# Batches of one process or worker in preparation. Grain's defaults (16 threads, 500 elements)
# would hold 12 GB of 8-frame clips of 1024 pixels.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Loader(Iterator[Batch]):
    """Batches from a position of the stream on, without end.

    The position, the number of batches given out, is its whole state, so a run goes on exactly
    with any number of workers and of processes: the stream is not read up to it but cut there.
    """

    def __init__(
        self,
        stream: grain.MapDataset[Batch],
        workers: int,
        names: Callable[[int], list[tuple[str, str]]],
        contents: dict[str, int],
        checksum: int = 0,
    ) -> None:
        """`names`: (source, clip) of all rows of a batch; `contents`: clips by source.

        With another number of clips, or of another `checksum` of their names, it is another
        stream.
        """
        self._stream, self._workers, self._names = stream, workers, names
        self._contents, self._checksum = contents, checksum
        self._position = 0
        self._batches: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        """The next batch. Its arrays may lie in shared memory: copy what is kept."""
        with starting_workers() if self._workers else contextlib.nullcontext():
            if self._batches is None:
                self._batches = iter(self._open())
            batch = next(self._batches)
        self._position += 1
        return batch

    def _open(self) -> grain.IterDataset[Batch]:
        rest = self._stream[self._position :] if self._position else self._stream
        read = rest.to_iter_dataset(READ)
        if not self._workers:
            return read
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags when it starts its workers
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
        return read.mp_prefetch(options, worker_init_fn=begin_worker)

    def source_of(self, position: int) -> str:
        """Name of the source that batch number `position` comes from."""
        return self._names(position)[0][0]

    def clips_of(self, position: int) -> list[str]:
        """Names of the clips of batch number `position`, of all processes.

        Of a clip that cannot be read (`on_error` "skip") its own, not its replacement's.
        """
        return [clip for _, clip in self._names(position)]

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes: JSON, the same on every process."""
        return {"batches": self._position, "clips": self._contents, "names": self._checksum}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after so many batches.

        Raises:
            UserError: the sources have not the clips that they had then, as far as numbers and
                names tell, so this is another stream.
        """
        now = json.dumps(self._contents)
        mend = (
            "put back what was there, or start a new --workdir with "
            "--config.checkpoint.init_from=OLD_WORKDIR"
        )
        if state["clips"] != self._contents:
            raise UserError(
                f"the training data have changed: {json.dumps(state['clips'])} clips at the "
                f"checkpoint, {now} now; {mend}"
            )
        if state.get("names", self._checksum) != self._checksum:  # checkpoints may lack it
            raise UserError(
                f"the training data have changed: as many clips as at the checkpoint ({now}), but "
                f"of other names or in another order; {mend}"
            )
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Ends worker processes and gives back their shared memory."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None
