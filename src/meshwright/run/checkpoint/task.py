"""Work on a thread, whose end can be seen without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

__all__ = ["Task"]

_Found = TypeVar("_Found")


class Task(Generic[_Found]):
    """A call on a thread of its own, which does not keep the process from ending."""

    def __init__(self, act: Callable[[], _Found], name: str) -> None:
        """Begin `act()` on a thread of this name."""
        self._act = act
        self._found: list[_Found] = []
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._act())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._error = error

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait for its end, at most so long; whether it came."""
        self._thread.join(seconds)
        return self.done

    def result(self) -> _Found:
        """What it returned; what it raised is raised. Only once it is done."""
        assert self.done
        if self._error is not None:
            raise self._error
        return self._found[0]
