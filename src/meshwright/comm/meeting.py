"""Where the ranks of a world have met, whatever carries their data: the store and the roll.

Also what every driver says and does alike: deadlines, who is late, and leaving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from meshwright.comm.base import World
from meshwright.comm.roll import Roll, named
from meshwright.comm.store import Rendezvous, open_store
from meshwright.errors import Stalled

__all__ = ["Deadline", "Meeting"]

_LEAVE_WITHIN = 10.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """Seconds a wait may take: the `first` time at a place (others may compile), and `after`."""

    first: float = 1800.0
    after: float = 300.0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """Several ranks that have proved the token to each other.

    Attributes:
        root: the whole store, which lives as long as this; `store` is the job's private part.
    """

    world: World
    where: Rendezvous
    deadline: Deadline
    store: Store
    root: TCPStore
    roll: Roll

    @classmethod
    def open(cls, world: World, where: Rendezvous, deadline: Deadline) -> Meeting:
        """Join the other ranks at `where`.

        Raises:
            UsageError: the address, port or token is wrong.
            Stalled: a rank did not come within `where.seconds`; names it.
        """
        store, root = open_store(world, where)
        return cls(world, where, deadline, store, root, Roll.join(store, world, where.seconds))

    def gather(
        self,
        name: str,
        ranks: Sequence[int],
        what: str,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Wait until all `ranks` have come to the place `name`, on the way to doing `what`.

        `meanwhile` is called again and again until then.

        Raises:
            Stalled: somebody has not come by the first deadline.
            PeerLost: somebody is gone.
        """
        self.roll.sign(name)
        self.roll.arrive(name, ranks, self.deadline.first, what, meanwhile)

    def put(self, key: str, text: str, what: str) -> None:
        """Leave a text in the store, on the way to doing `what`.

        Raises:
            PeerLost: the store is gone.
        """
        with self.roll.reaching(what):
            self.store.set(key, text)

    def get(self, key: str, what: str) -> str:
        """A text that somebody has left in the store.

        Raises:
            PeerLost: the store is gone.
        """
        with self.roll.reaching(what):
            return self.store.get(key).decode()

    def stalled(self, place: str, ranks: Sequence[int], seconds: float, last: str) -> Stalled:
        """The error for a wait past its deadline: who waits where, and who has not come.

        Args:
            place: the collective waited for, named alike on all its members.
            ranks: its members.
            seconds: how long it was waited for.
            last: the collective finished last on this rank.
        """
        rank = self.world.rank
        others = [other for other in ranks if other != rank]
        places = self.roll.whereabouts(others)
        missing = [other for other in others if places.get(other) != place]
        who = "; ".join(
            f"{named([other])} " + (f"is in {places[other]}" if other in places else "did not come")
            for other in missing
        )
        reason = (
            f"{place} took more than {seconds:g} s on rank {rank}: "
            f"{who or 'every member is in it, yet nothing moves'} (last finished here: {last}); "
            "see the logs of those ranks, or give more time with --timeout"
        )
        self.roll.tell(reason)
        return Stalled(reason)

    def leave(self) -> None:
        """Say goodbye; whoever keeps the store waits for the others' goodbyes."""
        keeper = self.world.rank == 0 and not self.where.hosted
        self.roll.leave(_LEAVE_WITHIN, keeper=keeper)
