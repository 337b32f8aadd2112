"""Signals in a worker: the first asks to stop at the end of the step, the second ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

__all__ = ["STOPPING", "Stop", "listen"]

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@final
class Stop:
    """Whether this process was asked to stop. Ranks hear it at different steps: agree on it."""

    def __init__(self) -> None:
        self.number: int = 0

    def __bool__(self) -> bool:
        return self.number != 0

    @property
    def status(self) -> int:
        """The exit status that says which signal it was: 128 + its number; 0 when there is none."""
        return 128 + self.number if self.number else 0

    def heard(self, number: int, _frame: FrameType | None = None) -> None:
        """Note the first signal; exit at the second."""
        if self.number:
            os._exit(128 + number)
        self.number = number


@contextmanager
def listen() -> Iterator[Stop]:
    """Within, SIGTERM, SIGINT and SIGUSR1 set the `Stop` that is given; main thread only."""
    stop = Stop()
    before = {number: signal.signal(number, stop.heard) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
