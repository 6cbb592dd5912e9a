"""An iterator over batches whose position can be saved, and is a count.

A batch is a function of its number. Nothing is remembered from one to the next, so that
any thread or worker can make any batch, and where a run was is all it takes to go on.
"""

import asyncio
import json
import time
from collections.abc import Awaitable
from typing import Any, Protocol

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class BatchSource(Protocol):
    """A sequence of batches in random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Batches(grain.DatasetIterator[Batch]):
    """Goes through a source of batches; the position is a number of examples.

    The position is that of all processes and of any number of workers: what one
    topology has saved, another can restore.

    Args:
      source: of the batches.
      batch_size: of all processes together, to count examples with.
      workers: processes that make batches ahead of time; 0: threads do.
      threads: so many, where there are no workers; 0: a batch is made when it is asked
        for.

    Attributes:
      seconds: that `next` has taken in all: while it grows as fast as the clock does,
        the network waits for images.
    """

    def __init__(
        self, source: BatchSource, batch_size: int, *, workers: int, threads: int
    ):
        super().__init__()
        self._source = source
        self._batch_size = batch_size
        self._workers = workers
        self._threads = threads
        self._done = 0
        self._ahead: Any = None
        self.seconds = 0.0

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if self._ahead is None:
            self._ahead = self._start()
        try:
            batch = next(self._ahead)
        except StopIteration:
            self.close()
            raise
        self._done += 1
        self.seconds += time.perf_counter() - begin
        return batch

    def _start(self) -> Any:
        batches = grain.MapDataset.source(self._source)[self._done :]
        if self._workers == 0:
            return iter(batches.to_iter_dataset(_read_ahead(self._threads)))
        options = grain.MultiprocessingOptions(
            num_workers=self._workers, per_worker_buffer_size=2
        )
        # One batch at a time in a worker: a batch of large images is large itself.
        return iter(batches.to_iter_dataset(_read_ahead(1)).mp_prefetch(options))

    def close(self) -> None:
        """End the workers; the next batch starts them anew."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def get_state(self) -> dict[str, Any]:
        """Return the position: how many examples are done."""
        return {"examples": self._done * self._batch_size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
          ValueError: where no batch begins there.
        """
        done, rest = divmod(int(state["examples"]), self._batch_size)
        if rest:
            raise ValueError(
                f"The position of the data must be a multiple of the batch size, which "
                f"is {self._batch_size}, got {state['examples']}: go on with the batch "
                "size of the run that saved it."
            )
        self.close()
        self._done = done

    async def load(self, directory: Any) -> Awaitable[None]:
        """Restore for Orbax what any process of the run that saved has written."""

        async def restore():
            files = sorted(directory.glob("process_*.json"))
            if not files:
                raise ValueError(f"{directory} has no position of the data.")
            text = await asyncio.to_thread(files[0].read_text)
            self.set_state(json.loads(text))

        return restore()


def _read_ahead(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
