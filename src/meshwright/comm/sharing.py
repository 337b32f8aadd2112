"""The memory that the ranks of one host share: whether they can, and how they come by it.

Each rank says whether it can take part; all read all answers, so either every rank shares memory or
none does, and all know the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from meshwright.comm import futex
from meshwright.comm.channel import SLOTS, Bells, Channel, size_of
from meshwright.comm.meeting import Meeting
from meshwright.comm.pidfd import Peers
from meshwright.comm.roll import named
from meshwright.comm.segment import NoRoom, Segment
from meshwright.errors import OutOfMemory

__all__ = ["Ground", "Unsuited", "room_of"]

_CAPACITY = 1 << 19  # of a slot: two of them and the result stay in a core's cache
_ROOM = 1 << 26  # for one stream of all members' slots
_JOINING = "joining the world"
_Made = TypeVar("_Made")


class Unsuited(Exception):
    """These ranks cannot share memory; the text says why, the same on all of them."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """What ranks stand on that share memory.

    Attributes:
        bells: how they wake each other.
        peers: an eye on each other's processes.
        everyone: the channel of all ranks.
    """

    meeting: Meeting
    bells: Bells
    peers: Peers
    everyone: Channel

    @classmethod
    def prepare(cls, meeting: Meeting, refusal: str | None = None) -> Ground:
        """Find out whether all ranks can, and let them.

        Args:
            meeting: the ranks.
            refusal: why this one does not want to.

        Raises:
            Unsuited: some rank cannot.
            PeerLost: one of them ended meanwhile.
        """
        world = meeting.world
        _unless(meeting, "willing", refusal or _problem(meeting))
        others = {c.rank: c.pid for c in meeting.roll.cards if c.rank != world.rank}
        peers = _agreed(meeting, "peers", lambda: Peers(others))
        ranks = tuple(range(world.size))
        try:
            size = Bells.bytes(world.size)
            segment = _agreed(meeting, "bells", lambda: _common(meeting, "bells", ranks, size))
            bells = Bells(segment, world.rank, world.size)
            bells.declare(os.sched_getaffinity(0))
            everyone = _agreed(meeting, "room", lambda: _channel(meeting, ranks, bells))
        except BaseException:
            peers.close()
            raise
        return cls(meeting, bells, peers, everyone)

    def channel(self, ranks: tuple[int, ...], what: str, meanwhile: Callable[[], None]) -> Channel:
        """The channel of these ranks, all of which are about to do `what`.

        While they are not all there, `meanwhile` keeps going what they may be waiting for.

        Raises:
            Stalled: some member does not come.
            PeerLost: some member is gone.
            OutOfMemory: there is no room for it.
        """
        if ranks == self.everyone.ranks:
            return self.everyone
        try:
            return _channel(self.meeting, ranks, self.bells, what, meanwhile)
        except NoRoom as error:
            raise OutOfMemory(
                f"{what}: no shared memory for {named(ranks)}: {error}; "
                "give the job more, or set MESHWRIGHT_COMM=gloo"
            ) from None

    def close(self) -> None:
        """Let go of the peers; memory goes with its last mapping."""
        self.peers.close()
        self.bells.segment.close()


def _problem(meeting: Meeting) -> str | None:
    """Why this rank cannot share memory with the others, as far as it knows by itself."""
    machines = {card.machine for card in meeting.roll.cards}
    if len(machines) > 1:
        return f"ranks are on {len(machines)} hosts or in containers of their own"
    return futex.problem()


def _capacity(members: int) -> int:
    """Bytes of a slot, so that all members' slots fit in the room."""
    return max(min(_CAPACITY, _ROOM // (SLOTS * members)), 4096, 64 * members)


def room_of(members: int) -> int:
    """Bytes that the channel of so many ranks takes."""
    return size_of(members, _capacity(members))


def _channel(
    meeting: Meeting,
    ranks: tuple[int, ...],
    bells: Bells,
    what: str = _JOINING,
    meanwhile: Callable[[], None] | None = None,
) -> Channel:
    """The channel of these ranks.

    Raises:
        NoRoom: as `_common`.
    """
    capacity = _capacity(len(ranks))
    name = ",".join(map(str, ranks))
    segment = _common(meeting, name, ranks, size_of(len(ranks), capacity), what, meanwhile)
    return Channel(segment, ranks.index(meeting.world.rank), ranks, bells, capacity)


def _common(
    meeting: Meeting,
    name: str,
    ranks: Sequence[int],
    size: int,
    what: str = _JOINING,
    meanwhile: Callable[[], None] | None = None,
) -> Segment:
    """A segment that the first of `ranks` makes and the others attach to.

    Raises:
        NoRoom: it cannot be made, or not be opened by this rank.
    """
    place, maker = f"segment/{name}", meeting.world.rank == ranks[0]
    made: Segment | None = None
    if maker:
        try:
            made = Segment.create(size)
            card = made.card
        except NoRoom as error:
            card = f"!{error}"
        meeting.put(f"{place}/card", card, what)
    meeting.gather(place, ranks, what, meanwhile)
    card = meeting.get(f"{place}/card", what)
    if card.startswith("!"):
        raise NoRoom(card[1:])
    segment = made or Segment.attach(card)
    # The maker may end soon, and nobody else can be asked for it.
    meeting.gather(f"{place}/attached", ranks, what, meanwhile)
    return segment


def _agreed(meeting: Meeting, name: str, make: Callable[[], _Made]) -> _Made:
    """What `make` makes, if it does so on all ranks."""
    made: _Made | None = None
    try:
        made, problem = make(), None
    except NoRoom as error:
        problem = str(error)
    except OSError as error:
        problem = f"{name}: {os.strerror(error.errno or 0)}"
    _unless(meeting, name, problem)
    assert made is not None
    return made


def _unless(meeting: Meeting, name: str, problem: str | None) -> None:
    """Raise Unsuited on all ranks if one of them has a problem.

    Ranks with the same problem are named together.
    """
    place, ranks = f"sharing/{name}", range(meeting.world.size)
    meeting.put(f"{place}/problem/{meeting.world.rank}", problem or "", _JOINING)
    meeting.gather(place, ranks, _JOINING)
    said = {rank: meeting.get(f"{place}/problem/{rank}", _JOINING) for rank in ranks}
    reasons: dict[str, list[int]] = {}
    for rank, reason in said.items():
        if reason:
            reasons.setdefault(reason, []).append(rank)
    if reasons:
        raise Unsuited("; ".join(f"{named(who)}: {why}" for why, who in reasons.items()))
