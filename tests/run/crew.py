"""N ranks in one process, each as a user's script would be: a function of a `Comm`.

Every rank has a thread, of which one runs at a time; what they communicate is performed by one
`LocalWorld` once all have come. So whole sessions and runs are tested without processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from meshwright.comm.base import World
from meshwright.comm.local import LocalWorld

PATIENCE = 60.0


class Gone(Exception):
    """Another rank failed; this one has nobody to talk to."""


class _Meeting:
    """Where ranks bring exchanges; the last to come performs them all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.world = LocalWorld(size)
        self.turn = threading.Condition()
        self.brought: dict[int, Any] = {}
        self.found: dict[int, Any] = {}
        self.round = 0
        self.error: BaseException | None = None

    def perform(self, rank: int, exchange: Any) -> Any:
        """Called with `turn` held, as all of a rank's code runs."""
        self.brought[rank] = exchange
        if self.error is not None:
            raise Gone
        if len(self.brought) == self.size:
            exchanges = [self.brought[r] for r in range(self.size)]
            self.brought.clear()
            try:
                self.found = dict(enumerate(self.world.perform(exchanges)))
            except BaseException as error:
                self.found, self.error = {}, error
                raise
            finally:
                self.round += 1
                self.turn.notify_all()
            return self.found[rank]
        mine = self.round
        if not self.turn.wait_for(lambda: self.round > mine or self.error is not None, PATIENCE):
            raise TimeoutError(f"rank {rank} waited for the others")
        if self.round == mine or rank not in self.found:
            raise Gone from self.error
        return self.found[rank]


class _Comm:
    """One rank's end of the meeting."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.meeting = meeting
        self.world = World(rank, meeting.size, rank, meeting.size)
        self.notes = ()

    def perform(self, exchange: Any, answer: Any = None) -> Any:
        assert answer is None
        return self.meeting.perform(self.world.rank, exchange)

    def abandon(self, reason: str) -> None:
        """The others see that this rank is gone."""

    def close(self) -> None:
        """Nothing to leave."""


def crew(size: int, body: Callable[[Any], Any]) -> list[Any]:
    """`body(comm)` on every rank; their results in rank order, or the first error."""
    meeting = _Meeting(size)
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        with meeting.turn:
            try:
                results[number] = body(_Comm(meeting, number))
            except Gone:
                pass
            except BaseException as error:  # noqa: BLE001 - told by the caller's thread
                errors.append(error)
                meeting.error = meeting.error or error
                meeting.turn.notify_all()

    threads = [threading.Thread(target=rank, args=(n,), daemon=True) for n in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if errors or meeting.error:
        raise errors[0] if errors else meeting.error
    return [results[n] for n in range(size)]
