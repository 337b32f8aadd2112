"""Who is still here: every rank's card, and how to find out which rank is gone.

gloo says that a connection broke, not whose. Ranks therefore leave a card in the store (host and
process id) when they join; on one host the kernel knows whether that process lives, and ranks on
other hosts are asked to answer.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from meshwright.comm.base import World
from meshwright.comm.store import await_keys
from meshwright.errors import PeerLost, Stalled

__all__ = ["Card", "Roll", "named", "own_card"]

_SLICE = 0.25
_BUSY = 0.005
_ANSWER_WITHIN = 1.0


@dataclass(frozen=True, slots=True)
class Card:
    """Where a rank runs. `machine` names a host and its process-id namespace."""

    rank: int
    pid: int
    host: str
    machine: str

    def alive(self) -> bool | None:
        """Whether the process runs; None when it is on another machine."""
        if self.machine != _machine():
            return None
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"


@final
class Roll:
    """The cards of a world, and what its ranks have said about one another."""

    def __init__(self, store: Store, world: World, cards: tuple[Card, ...]) -> None:
        """Use `Roll.join`."""
        self._store, self._world, self._cards = store, world, cards

    @classmethod
    def join(cls, store: Store, world: World, seconds: float) -> Roll:
        """Leave this rank's card and wait for everybody's.

        Raises:
            Stalled: somebody did not come in `seconds`; names who.
        """
        store.set(f"card/{world.rank}", json.dumps(asdict(own_card(world.rank))))
        roll = cls(store, world, ())
        ranks = range(world.size)
        roll.arrive("card", ranks, seconds, "joining the world")
        with roll.reaching("joining the world"):
            cards = tuple(Card(**json.loads(store.get(f"card/{rank}"))) for rank in ranks)
        return cls(store, world, cards)

    @property
    def cards(self) -> tuple[Card, ...]:
        """Every rank's card, in rank order."""
        return self._cards

    def obituary(self, ranks: Sequence[int]) -> str:
        """As in `rank 1 (pid 123) is gone`."""
        dead = [card for card in self._cards if card.rank in ranks]
        return ", ".join(f"rank {card.rank} (pid {card.pid})" for card in dead) + " is gone"

    def arrive(
        self,
        place: str,
        ranks: Sequence[int],
        seconds: float,
        what: str,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Wait until all `ranks` have set `place/<rank>`.

        Args:
            place: where to.
            ranks: who.
            seconds: how long.
            what: on the way to doing what; for messages.
            meanwhile: called again and again, for what must go on while this rank waits here.

        Raises:
            Stalled: after `seconds`; names the ranks that have not come.
            PeerLost: somebody said meanwhile that it is gone.
        """
        end = time.monotonic() + seconds
        missing = list(ranks)
        while missing:
            left = end - time.monotonic()
            if left <= 0:
                raise Stalled(
                    f"{what}: no sign of {named(missing)} after {seconds:g} s; "
                    "see the logs of those ranks, or give more time with --timeout"
                )
            keys = [f"{place}/{rank}" for rank in missing]
            with self.reaching(what):
                await_keys(self._store, keys, min(left, _BUSY if meanwhile else _SLICE))
                missing = [rank for rank in missing if not self._store.check([f"{place}/{rank}"])]
            if meanwhile is not None:
                meanwhile()
            if missing:
                self.check_news(what)

    def sign(self, place: str) -> None:
        """Set `place/<this rank>`, for others' `arrive`."""
        self._store.set(f"{place}/{self._world.rank}", "here")

    def check_news(self, what: str) -> None:
        """Raise PeerLost if some rank has said that it is gone or that somebody is."""
        with self.reaching(what):
            reason = self._store.get("lost").decode() if self._store.check(["lost"]) else None
        if reason is not None:
            raise PeerLost(f"{what} cannot finish: {reason}")

    def tell(self, reason: str) -> None:
        """Say for all to read why the world cannot go on; the first word stands."""
        with suppress(DistError):  # no store, and so nobody who could read this
            self._store.compare_set("lost", "", reason)

    def gone(self) -> str:
        """After a broken connection: which rank is missing, in words, as far as can be known."""
        with suppress(DistError):  # below it is found out who kept the store
            self.sign("answer")
        end = time.monotonic() + _ANSWER_WITHIN
        while True:
            dead = [card for card in self._cards if card.alive() is False]
            if dead:
                return self.obituary([card.rank for card in dead])
            if not self._listen(end):
                return self._silent()

    def waits(self, place: str) -> None:
        """Let others know in which collective this rank has been waiting for a while."""
        with self.reaching(place):
            self._store.set(f"at/{self._world.rank}", place)

    def goes_on(self) -> None:
        """Take back `waits`."""
        with suppress(DistError):  # a lost store shows at the next collective
            self._store.delete_key(f"at/{self._world.rank}")

    def whereabouts(self, ranks: Sequence[int]) -> dict[int, str]:
        """In which collective each of `ranks` waits; those that wait in none are left out."""
        with suppress(DistError):
            await_keys(self._store, [f"at/{rank}" for rank in ranks], _ANSWER_WITHIN)
        found = {}
        for rank in ranks:
            with suppress(DistError):
                if self._store.check([f"at/{rank}"]):
                    found[rank] = self._store.get(f"at/{rank}").decode()
        return found

    def leave(self, seconds: float, *, keeper: bool) -> None:
        """Say goodbye; the store's keeper waits up to `seconds` for the others to do so."""
        with suppress(DistError):  # then there is nobody left to say it to
            self.sign("left")
            if keeper:
                self._await_goodbyes(time.monotonic() + seconds)

    def _await_goodbyes(self, end: float) -> None:
        """Until `end` at most, and not for ranks that have ended without one."""
        missing = [f"left/{card.rank}" for card in self._cards if card.alive() is not False]
        while time.monotonic() < end and not await_keys(self._store, missing, _SLICE):
            missing = [f"left/{card.rank}" for card in self._cards if card.alive() is not False]

    def _listen(self, end: float) -> bool:
        """Wait a moment for answers; False when time is up or all have answered."""
        keys = [f"answer/{card.rank}" for card in self._cards]
        try:
            answered = await_keys(self._store, keys, _ANSWER_WITHIN / 10)
        except DistError:
            time.sleep(_ANSWER_WITHIN / 10)  # whose process it was shows when the kernel is done
            answered = False
        return not answered and time.monotonic() < end

    def _silent(self) -> str:
        try:
            quiet = [c.rank for c in self._cards if not self._store.check([f"answer/{c.rank}"])]
        except DistError:
            return "rank 0, which keeps the store, does not answer"
        if not quiet:
            return "a connection broke although every rank still answers"
        return f"{named(quiet)} did not answer within {_ANSWER_WITHIN:g} s"

    @contextmanager
    def reaching(self, what: str) -> Iterator[None]:
        """Within, the loss of the store is PeerLost: `what` cannot finish."""
        try:
            yield
        except DistError:
            raise PeerLost(f"{what} cannot finish: {self.gone()}") from None


def own_card(rank: int) -> Card:
    """This process's card."""
    return Card(rank, os.getpid(), socket.gethostname(), _machine())


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    try:
        return boot.read_text().strip() + str(namespace.readlink())
    except OSError:
        return socket.gethostname()


def named(ranks: Sequence[int]) -> str:
    """As in `rank 2` or `ranks 0, 2`."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
