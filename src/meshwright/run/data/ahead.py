"""Reading the next batch while a step computes, on a thread (docs/decisions/0011-prefetch.md)."""

from __future__ import annotations

import contextvars
import time
from collections import deque
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

_Batch = TypeVar("_Batch")

LONG = 2e-3
"""Seconds of waiting while reading, below which a thread costs more than it hides."""


class ReadAhead(Generic[_Batch]):
    """Reads batches on a thread between `begin` and `finish`, where reading has to wait.

    Waiting is what the clock shows beyond the reader's own processor time: what computes would only
    take turns with the step. It counts if the last few batches all waited, for a machine with more
    to do than it has cores lets anybody wait at times.

    Between the two nothing else may draw from the process's random generators: reading seeds them,
    and puts them back.
    """

    def __init__(self, read: Callable[[int], _Batch], long: float = LONG) -> None:
        """`read(step)` gives a batch or raises; `long` is `LONG` but in tests."""
        self._read, self._long = read, long
        self._waited: deque[float] = deque([0.0], maxlen=3)  # seconds, by the last batches
        self._bound = False  # reading fails on threads other than the main one
        self._reading: tuple[int, Thread] | None = None
        self._found: _Batch | None = None

    def begin(self, step: int) -> None:
        """Start to read the batch of `step`, if those before had to wait."""
        self.close()
        if min(self._waited) > self._long and not self._bound:
            context = contextvars.copy_context()
            thread = Thread(target=context.run, args=(self._run, step), daemon=True)
            self._reading = step, thread
            thread.start()

    def finish(self, step: int) -> _Batch:
        """The batch of `step`; what reading raises is raised here.

        What failed on the thread is read once more here, where it did before there was a thread: a
        database that knows its thread is one that is read here from then on.
        """
        reading = self._reading
        self.close()
        if reading is None or reading[0] != step:
            return self._timed(step)
        found, self._found = self._found, None
        if found is None:
            found = self._timed(step)
            self._bound = True
        return found

    def close(self) -> None:
        """Wait until nothing is read."""
        if self._reading is not None:
            self._reading[1].join()
            self._reading = None

    def _run(self, step: int) -> None:
        self._found = None
        try:
            self._found = self._timed(step)
        except BaseException:  # noqa: BLE001 - `finish` reads again, and there it is raised
            return

    def _timed(self, step: int) -> _Batch:
        began = time.perf_counter() - time.thread_time()
        found = self._read(step)
        self._waited.append(time.perf_counter() - time.thread_time() - began)
        return found
