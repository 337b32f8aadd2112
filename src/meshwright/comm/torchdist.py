"""The driver over torch's process groups: one rank's generators over gloo, between processes.

Every wait has a deadline and is cut into slices, so that signals are heard and the news of a lost
rank arrives although gloo itself cannot be interrupted. A group connects when it is first used, by
its members only. A world of one needs no process group at all.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work  # type: ignore[attr-defined]

from meshwright.comm import fingerprint
from meshwright.comm.base import Exchange, Group, Handle, Start, Wait, World
from meshwright.comm.gloo import Link, Pending, connect, start
from meshwright.comm.ledger import Entry, Ledger, describe
from meshwright.comm.local import collective
from meshwright.comm.roll import Roll, named
from meshwright.comm.store import Rendezvous, open_store, own_address
from meshwright.errors import InternalError, MeshwrightError, PeerLost, Stalled

__all__ = ["Deadline", "TorchDist"]

_SLICE = timedelta(seconds=0.25)
_LEAVE_WITHIN = 10.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """Seconds a wait may take: the `first` time at a place (others may compile), and `after`."""

    first: float = 1800.0
    after: float = 300.0


_Place = tuple[str, Group, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Token:
    """A started collective; `place` names it alike on all members, by its number in the group."""

    entry: Entry
    pending: Pending
    place: str


@final
class TorchDist:
    """A `Comm` over gloo. Use `TorchDist.connect`, or `TorchDist()` for a world of one."""

    def __init__(
        self,
        world: World | None = None,
        wire: _Wire | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._world = world or World()
        self._wire = wire
        self._deadline = deadline or Deadline()
        self._seen: set[_Place] = set()
        self._compared: set[_Place] = set()
        self._numbers: dict[tuple[int, ...], int] = {}
        self.ledger = Ledger(self._world.rank)

    @classmethod
    def connect(
        cls, world: World, where: Rendezvous | None, deadline: Deadline | None = None
    ) -> TorchDist:
        """Join the other ranks at `where`; a world of one joins nobody.

        Raises:
            UsageError: the address, port or token is wrong.
            Stalled: a rank did not come within `where.seconds`; names it.
        """
        if world.size == 1:
            return cls(world, deadline=deadline)
        if where is None:
            raise InternalError(f"a world of {world.size} ranks needs a place to meet")
        deadline = deadline or Deadline()
        store, root = open_store(world, where)
        roll = Roll.join(store, world, where.seconds)
        wire = _Wire(world, where, deadline, roll, store, root)
        return cls(world, wire, deadline)

    @property
    def world(self) -> World:
        """Which rank this is, of how many."""
        return self._world

    def perform(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it returns, and return its value."""
        try:
            thing = self._drive(exchange, answer)
        except StopIteration as end:
            return end.value
        raise InternalError(f"the exchange yielded {thing!r}, which is no request")

    def advance(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it yields something that is no request, and return that.

        If the exchange returns instead, so does this, with its value.
        """
        try:
            return self._drive(exchange, answer)
        except StopIteration as end:
            return end.value

    def close(self) -> None:
        """Leave the world, once; rank 0, who keeps the store, waits a little for the others."""
        if self._wire is not None:
            self._wire.leave()
            self._wire = None

    def abandon(self, reason: str) -> None:
        """Tell the other ranks why this one ends, so that they stop at once and can say so."""
        if self._wire is not None:
            self._wire.roll.tell(f"rank {self._world.rank} ended: {reason}")

    def _drive(self, exchange: Exchange, answer: Any) -> Any:
        """Perform requests until another thing is yielded; StopIteration when it ends."""
        thing = exchange.send(answer)
        while isinstance(thing, Start | Wait):
            try:
                answer = self._start(thing) if isinstance(thing, Start) else self._wait(thing)
            except Exception as error:  # noqa: BLE001  the generator decides what to do with it
                thing = exchange.throw(error)
            else:
                thing = exchange.send(answer)
        return thing

    def _start(self, request: Start) -> Handle:
        ranks = request.group.ranks
        if self._world.rank not in ranks:
            raise InternalError(
                f"rank {self._world.rank} starts {describe(request)}, "
                f"whose members are ranks {list(ranks)}"
            )
        for tensor in request.tensors:
            if tensor.device.type != "cpu":
                raise InternalError(f"{describe(request)} is on {tensor.device}; gloo wants CPU")
        entry = self.ledger.enter(request)
        if len(ranks) == 1:
            (answer,) = collective([request])
            return Handle(request, _Token(entry, Pending((), lambda: answer), describe(request)))
        link = self._alive().group(request.group, describe(request))
        number = self._numbers[ranks] = self._numbers.get(ranks, 0) + 1
        where = f"{describe(request)}, call {number}"
        if _place(request) not in self._compared:
            self._compare(link, request, entry, where)
        return Handle(request, _Token(entry, self._begin(link, request), where))

    def _compare(self, link: Link, request: Start, entry: Entry, where: str) -> None:
        """See that all members mean the same collective, the first time at its place."""
        self._compared.add(_place(request))
        words = fingerprint.encode(fingerprint.text(request))
        ask = Start("all_gather", request.group, (words,))
        pending = self._begin(link, ask)
        self._settle(request, _Token(entry, pending, where))
        texts = [fingerprint.decode(answer) for answer in pending.finish()]
        fingerprint.require_same(texts, request.group.ranks, request.group.axis)

    def _begin(self, link: Link, request: Start) -> Pending:
        try:
            return start(link, request)
        except RuntimeError as error:
            raise self._lost(request, error) from error

    def _wait(self, wait: Wait) -> tuple[Tensor, ...]:
        token: _Token = wait.handle.token
        if token.pending.works:
            self._settle(wait.handle.request, token)
            self._seen.add(_place(wait.handle.request))
        self.ledger.leave(token.entry)
        return token.pending.finish()

    def _settle(self, request: Start, token: _Token) -> None:
        """Wait for all works of `token`, which serve `request`, until its deadline."""
        first = _place(request) not in self._seen
        seconds = self._deadline.first if first else self._deadline.after
        end = time.monotonic() + seconds
        for work in token.pending.works:
            if not self._in_time(work, token, request, end):
                last = self.ledger.last_left.text() if self.ledger.last_left else "none"
                raise self._alive().stalled(token, request, seconds, last)

    def _in_time(self, work: Work, token: _Token, request: Start, end: float) -> bool:
        """Wait for `work`, with an eye on the other ranks; False when `end` has come."""
        told = False
        while not work.is_completed():
            try:
                work.wait(_SLICE)
            except RuntimeError:
                if work.is_completed():
                    break  # it failed rather than being late: asked again below
                roll = self._alive().roll
                if not told:
                    roll.waits(token.place)
                    told = True
                roll.check_news(describe(request))
                if time.monotonic() > end:
                    return False
        if told:
            self._alive().roll.goes_on()
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(request, error) from error
        return True

    def _lost(self, request: Start, error: RuntimeError) -> MeshwrightError:
        """What to raise when gloo failed: the news if there is any, else who is gone."""
        if not _is_connection(error):
            return InternalError(f"{describe(request)} failed: {error}")
        roll = self._alive().roll
        try:
            roll.check_news(describe(request))
        except PeerLost as known:
            return known
        reason = roll.gone()
        roll.tell(reason)
        return PeerLost(f"{describe(request)} cannot finish: {reason}")

    def _alive(self) -> _Wire:
        if self._wire is None:
            raise InternalError(f"rank {self._world.rank} has left the world")
        return self._wire


@final
class _Wire:
    """What a world of several ranks shares: the store, the roll, and the connected groups."""

    def __init__(
        self,
        world: World,
        where: Rendezvous,
        deadline: Deadline,
        roll: Roll,
        store: Store,
        root: TCPStore,
    ) -> None:
        self.roll = roll
        self._world, self._where, self._deadline = world, where, deadline
        self._store, self._root = store, root
        self._device = _device(where)
        self._groups: dict[tuple[int, ...], Link] = {}

    def group(self, group: Group, what: str) -> Link:
        """The process group of these ranks, connected when first asked for."""
        known = self._groups.get(group.ranks)
        if known is None:
            known = self._groups[group.ranks] = self._connect(group.ranks, what)
        return known

    def _connect(self, ranks: tuple[int, ...], what: str) -> Link:
        name = "group/" + ",".join(map(str, ranks))
        self.roll.sign(name)
        self.roll.arrive(name, ranks, self._deadline.first, what)
        # gloo's own limit only ever ends what ours has given up.
        limit = 2 * max(self._deadline.first, self._deadline.after) + 60
        index = ranks.index(self._world.rank)
        try:
            return connect(
                PrefixStore(f"gloo/{name}", self._store), index, len(ranks), self._device, limit
            )
        except RuntimeError as error:
            raise PeerLost(f"{what}: could not connect: {self.roll.gone()} ({error})") from error

    def stalled(self, token: _Token, request: Start, seconds: float, last: str) -> Stalled:
        """The error for a wait past its deadline: who waits where, and who has not come."""
        rank = self._world.rank
        others = [other for other in request.group.ranks if other != rank]
        places = self.roll.whereabouts(others)
        missing = [other for other in others if places.get(other) != token.place]
        who = "; ".join(
            f"{named([other])} " + (f"is in {places[other]}" if other in places else "did not come")
            for other in missing
        )
        reason = (
            f"{token.place} took more than {seconds:g} s on rank {rank}: "
            f"{who or 'every member is in it, yet nothing moves'} (last finished here: {last}); "
            "see the logs of those ranks, or give more time with --timeout"
        )
        self.roll.tell(reason)
        return Stalled(reason)

    def leave(self) -> None:
        """Say goodbye; whoever keeps the store waits for the others' goodbyes."""
        self._groups.clear()
        keeper = self._world.rank == 0 and not self._where.hosted
        self.roll.leave(_LEAVE_WITHIN, keeper=keeper)


def _place(request: Start) -> _Place:
    return request.op, request.group, request.label


def _device(where: Rendezvous) -> ProcessGroupGloo.Device:
    """What gloo listens on: one address or interface, never all."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interface:
        return ProcessGroupGloo.create_device(interface=interface)
    return ProcessGroupGloo.create_device(hostname=own_address(where.address, where.port))


def _is_connection(error: RuntimeError) -> bool:
    """Whether gloo's error is about a connection rather than about what was asked of it."""
    text = str(error)
    return any(word in text for word in ("onnection", "Timed out", "timed out", "Socket", "socket"))
