"""Threads that do work in the order it comes, and do not keep the process from ending."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import final

__all__ = ["Lane"]

_Work = tuple[Future[None], Callable[[], None]]


@final
class Lane:
    """Some threads over one queue; they start with the first work and end with the lane."""

    def __init__(self, threads: int, name: str) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._count, self._name, self._started = threads, name, False

    def submit(self, act: Callable[[], None]) -> Future[None]:
        """Queue work; the future tells its end, or what it raised."""
        if not self._started:
            self._started = True
            for _ in range(self._count):
                Thread(target=_run, args=(self._queue,), name=self._name, daemon=True).start()
            weakref.finalize(self, _ended, self._queue, self._count).atexit = False
        found: Future[None] = Future()
        self._queue.put((found, act))
        return found

    def close(self) -> None:
        """End the threads once they have done what is queued."""
        if self._started:
            _ended(self._queue, self._count)


def _ended(queue: SimpleQueue[_Work | None], count: int) -> None:
    for _ in range(count):
        queue.put(None)


def _run(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        found, act = work
        error = _raised(act)
        del work, act  # they hold tensors: who waits may count on their being free
        if error is None:
            found.set_result(None)
        else:
            found.set_exception(error)
        del found, error  # the next work may be long in coming


def _raised(act: Callable[[], None]) -> BaseException | None:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 - raised by who waits for it
        return error
    return None
