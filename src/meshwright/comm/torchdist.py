"""The driver over torch's process groups: one rank's generators over gloo, between processes.

Every wait has a deadline and is cut into slices, so that signals are heard and the news of a lost
rank arrives although gloo itself cannot be interrupted. A group connects when it is first used, by
its members only. A world of one needs no process group at all.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

from torch import Tensor
from torch.distributed import DistError, PrefixStore, ProcessGroupGloo, Work  # type: ignore[attr-defined]

from meshwright.comm import driving, fingerprint
from meshwright.comm.base import MESSAGES, Exchange, Group, Handle, Start, Wait, World
from meshwright.comm.gloo import Link, Pending, connect, start
from meshwright.comm.ledger import Entry, Ledger, describe
from meshwright.comm.line import Job, Lines
from meshwright.comm.local import collective
from meshwright.comm.meeting import Deadline, Meeting
from meshwright.comm.store import Rendezvous, own_address
from meshwright.errors import InternalError, MeshwrightError, PeerLost, Stalled

__all__ = ["TorchDist"]

_SLICE = timedelta(seconds=0.25)
_PAIR = 2

_Place = tuple[str, Group, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Token:
    """A started collective; `place` names it alike on all members, by its number in the group."""

    entry: Entry
    pending: Pending
    place: str
    job: Job | None = None


@final
class TorchDist:
    """A `Comm` over gloo. Use `TorchDist.connect`, or `TorchDist()` for a world of one."""

    def __init__(
        self,
        world: World | None = None,
        wire: _Wire | None = None,
        deadline: Deadline | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._world = world or World()
        self._wire = wire
        self._deadline = deadline or Deadline()
        self._seen: set[_Place] = set()
        self._compared: set[_Place] = set()
        self._numbers: dict[tuple[int, ...], int] = {}
        self.ledger = Ledger(self._world.rank)
        self.notes = notes

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
        return cls.over(Meeting.open(world, where, deadline or Deadline()))

    @classmethod
    def over(cls, meeting: Meeting, notes: tuple[str, ...] = ()) -> TorchDist:
        """Carry the data of ranks that have met; `notes` are for the user to read."""
        return cls(meeting.world, _Wire(meeting), meeting.deadline, notes)

    @property
    def world(self) -> World:
        """Which rank this is, of how many."""
        return self._world

    def perform(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it returns, and return its value."""
        return driving.perform(self, exchange, answer)

    def advance(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it yields something that is no request, and return that.

        If the exchange returns instead, so does this, with its value.
        """
        return driving.advance(self, exchange, answer)

    def close(self) -> None:
        """Leave the world, once; rank 0, who keeps the store, waits a little for the others."""
        if self._wire is not None:
            self._wire.leave()
            self._wire = None

    def abandon(self, reason: str) -> None:
        """Tell the other ranks why this one ends, so that they stop at once and can say so."""
        if self._wire is not None:
            self._wire.roll.tell(f"rank {self._world.rank} ended: {reason}")

    def start(self, request: Start) -> Handle:
        """Begin a collective."""
        ranks = request.group.ranks
        driving.require_mine(request, self._world.rank)
        entry = self.ledger.enter(request)
        if request.op in MESSAGES:
            job = self._alive().lines.post(request)
            where = f"{describe(request)}, message {job.number + 1}"
            return Handle(request, _Token(entry, Pending((), lambda: job.answer), where, job))
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

    def wait(self, wait: Wait) -> tuple[Tensor, ...]:
        """Finish one."""
        token: _Token = wait.handle.token
        if token.job is not None:
            self._delivered(token, token.job)
            self._seen.add(_place(wait.handle.request))
        if token.pending.works:
            self._settle(wait.handle.request, token)
            self._seen.add(_place(wait.handle.request))
        self.ledger.leave(token.entry)
        return token.pending.finish()

    def _delivered(self, token: _Token, job: Job) -> None:
        """Wait until a half of a message is done, with an eye on the other ranks."""
        if job.kept and not job.done.is_set():
            return
        request, began, told = job.request, time.monotonic(), False
        seconds = self._seconds(request)
        while not job.done.wait(_SLICE.total_seconds()):
            wire = self._alive()
            if not told:
                wire.roll.waits(token.place)
                told = True
            wire.look_after(request)
            if time.monotonic() - began > seconds:
                raise wire.stalled(token, request, seconds, self._last())
        if told:
            self._alive().roll.goes_on()
        if isinstance(job.error, RuntimeError):
            self._alive().lines.check()
            raise self._lost(request, job.error) from job.error
        if job.error is not None:
            raise job.error

    def _seconds(self, request: Start) -> float:
        """How long a wait for this may take."""
        seen = _place(request) in self._seen
        return self._deadline.after if seen else self._deadline.first

    def _last(self) -> str:
        """What this rank has finished last."""
        return self.ledger.last_left.text() if self.ledger.last_left else "none"

    def _settle(self, request: Start, token: _Token) -> None:
        """Wait for all works of `token`, which serve `request`, until its deadline."""
        seconds = self._seconds(request)
        end = time.monotonic() + seconds
        for work in token.pending.works:
            if not self._in_time(work, token, request, end):
                raise self._alive().stalled(token, request, seconds, self._last())

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
                self._alive().lines.check()
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
    """What a world of several ranks shares: where they met, and the connected groups."""

    def __init__(self, meeting: Meeting) -> None:
        self.roll, self._meeting = meeting.roll, meeting
        self._device = _device(meeting.where)
        self._groups: dict[tuple[int, ...], Link] = {}
        self.lines = Lines(meeting, self._dial)

    def look_after(self, message: Start) -> None:
        """Raise what is known to keep a message from being done.

        Raises:
            PeerLost: its other end is gone, or somebody says that the world cannot go on.
            UserCodeError: a receiver did not expect what this rank has sent.
        """
        what = describe(message)
        with self.roll.reaching(what):
            self.lines.check()
        self.roll.check_news(what)
        if self.roll.cards[message.peer].alive() is False:
            reason = self.roll.obituary([message.peer])
            self.roll.tell(reason)
            raise PeerLost(f"{what} cannot finish: {reason}")

    def group(self, group: Group, what: str) -> Link:
        """The process group of these ranks, connected when first asked for."""
        known = self._groups.get(group.ranks)
        if known is None:
            known = self._groups[group.ranks] = self._connect(group.ranks, what)
        return known

    def _connect(self, ranks: tuple[int, ...], what: str) -> Link:
        name = "group/" + ",".join(map(str, ranks))
        meeting = self._meeting
        meeting.gather(name, ranks, what)
        index = ranks.index(meeting.world.rank)
        try:
            return self._dial(name, index, len(ranks))
        except RuntimeError as error:
            raise PeerLost(f"{what}: could not connect: {self.roll.gone()} ({error})") from error

    def _dial(self, name: str, index: int, size: int = _PAIR) -> Link:
        """Connect with members who do so now."""
        meeting, deadline = self._meeting, self._meeting.deadline
        # gloo's own limit only ever ends what ours has given up.
        limit = 2 * max(deadline.first, deadline.after) + 60
        # gloo waits for keys with the store's client locked, and a line's thread must not keep
        # another from putting what its peer waits for: each has a client of its own.
        store = meeting.store.clone() if size == _PAIR else meeting.store  # type: ignore[attr-defined]
        return connect(PrefixStore(f"gloo/{name}", store), index, size, self._device, limit)

    def stalled(self, token: _Token, request: Start, seconds: float, last: str) -> Stalled:
        """The error for a wait past its deadline."""
        return self._meeting.stalled(token.place, request.group.ranks, seconds, last)

    def leave(self) -> None:
        """Say goodbye; whoever keeps the store waits for the others' goodbyes."""
        with suppress(DistError):  # the store went with its keeper, and so did who would receive
            self.lines.close()
        self._groups.clear()
        self._meeting.leave()


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
