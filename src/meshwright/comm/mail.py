"""Messages over shared memory: what is sent lies in the sender's lane until it is taken.

Nobody waits for a peer to open a lane. The sender makes it at its first message and leaves its card
in the memory of the world; the receiver looks there when it wants a message. A message that is
large for the lane gets a larger one, whose card goes through the old one. If there is no room for
it, or it is larger than any, it goes through a piece at a time, whenever its sender is in any Start
or Wait and its receiver, too.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from itertools import pairwise
from typing import final

from torch import Tensor

from meshwright.comm import fingerprint
from meshwright.comm.base import Start
from meshwright.comm.cargo import Cargo
from meshwright.comm.channel import Bells, Meaning
from meshwright.comm.lane import HEAD, Lane, capacity_for, size_of
from meshwright.comm.ledger import describe
from meshwright.comm.pidfd import Peers
from meshwright.comm.pool import Pool
from meshwright.comm.pump import Steps
from meshwright.comm.segment import NoRoom, Segment
from meshwright.errors import OutOfMemory, UserCodeError

__all__ = ["Mail"]

_MOVED = 0  # in place of a digest: the words are the next lane's card
_LEAVE_WITHIN = 10.0
_ATTACH_WITHIN = 1.0


@final
class _Outbox:
    """The sender's end of the lanes from this rank to another."""

    def __init__(self, bells: Bells, to: int) -> None:
        self.bells, self.to = bells, to
        self.lanes: list[Lane] = []  # the last is in use; the receiver may not have left the others
        self.started = self.turn = 0  # messages
        self.grows = True

    def check(self) -> None:
        """Raise what the receiver did not expect."""
        for lane in self.lanes:
            why = lane.refused()
            if why is not None:
                raise UserCodeError(why)

    def publish(self) -> None:
        self.lanes[-1].publish()
        self.bells.ring((self.to,))

    def open(self, message: int) -> None:
        """Have a first lane.

        Raises:
            NoRoom: it cannot be made.
        """
        if not self.lanes:
            self.lanes = [Lane(Segment.create(size_of(capacity_for(message))))]
            self.bells.leave_card(self.to, self.lanes[0].segment.card)
            self.bells.ring((self.to,))

    def larger(self, message: int) -> Lane | None:
        """A new lane, if messages of this size want one of twice the size or more."""
        wanted = capacity_for(message)
        if not self.grows or wanted < 2 * self.lanes[-1].capacity:
            return None
        try:
            return Lane(Segment.create(size_of(wanted)))
        except NoRoom:
            self.grows = False
            return None

    def move(self, lane: Lane) -> None:
        """Go on in another lane; the one in use has room for a head."""
        card = lane.segment.card.encode()
        self.lanes[-1].write_head(_MOVED, 0, card)
        self.publish()
        # A lane may go once its receiver has left it: it may refuse something there until then.
        left = [old for old, following in pairwise(self.lanes) if following.attached]
        for old in left:
            old.segment.close()
        self.lanes = [*self.lanes[len(left) :], lane]


@final
class _Inbox:
    """The receiver's end of the lanes from another rank to this one."""

    def __init__(self, bells: Bells, peers: Peers, source: int) -> None:
        self.bells, self.peers, self.source = bells, peers, source
        self.lane: Lane | None = None
        self.started = self.turn = 0
        self.broken: str | None = None
        self._tried: float | None = None
        self._card: str | None = None

    def find(self) -> Lane | None:
        """The lane in use, once its sender has made it."""
        if self.lane is None:
            self._card = self._card or self.bells.card(self.source)
            if self._card is not None:
                self._attach(self._card)
        return self.lane

    def follow(self, card: bytes) -> None:
        """Leave a lane for the next."""
        self.lane, self._card = None, card.decode()

    def release(self) -> None:
        assert self.lane is not None
        self.lane.release()
        self.bells.ring((self.source,))

    def refuse(self, lane: Lane, why: str) -> None:
        """Take no more from this sender, and let both sides say why."""
        self.broken = why
        lane.refuse(why)
        self.bells.ring((self.source,))

    def _attach(self, card: str) -> None:
        try:
            lane = Lane(Segment.attach(card))
        except NoRoom as error:
            # A process that ends closes its files a little before the kernel says that it is gone.
            now = time.monotonic()
            self._tried = self._tried or now
            if now - self._tried > _ATTACH_WITHIN and not self.peers.ended((self.source,)):
                raise OutOfMemory(
                    f"messages from rank {self.source} cannot be read: {error}; "
                    "give the job more memory, or set MESHWRIGHT_COMM=gloo"
                ) from None
            return
        lane.attach()
        self.bells.ring((self.source,))
        self.lane, self._card, self._tried = lane, None, None


@final
class Mail:
    """What one rank sends to and receives from all others."""

    def __init__(self, bells: Bells, peers: Peers, pool: Pool) -> None:
        """Over the memory and the processes of a world."""
        self._bells, self._peers, self._pool = bells, peers, pool
        self._out: dict[int, _Outbox] = {}
        self._in: dict[int, _Inbox] = {}

    def begin(
        self, request: Start, tensors: tuple[Tensor, ...], meaning: Meaning
    ) -> tuple[int, Steps]:
        """A message's number on its way, from 1, and the steps of this rank's half.

        Raises:
            OutOfMemory: there is no room for a lane.
            UserCodeError: the receiver expected another message before.
        """
        if request.op == "send":
            out = self._out.setdefault(request.peer, _Outbox(self._bells, request.peer))
            out.check()
            cargo = Cargo(tensors)
            try:
                out.open(HEAD + cargo.size)
            except NoRoom as error:
                raise OutOfMemory(
                    f"{describe(request)}: no shared memory for it: {error}; "
                    "give the job more, or set MESHWRIGHT_COMM=gloo"
                ) from None
            out.started += 1
            return out.started, _send(out, out.started - 1, cargo, meaning)
        box = self._in.setdefault(request.peer, _Inbox(self._bells, self._peers, request.peer))
        box.started += 1
        return box.started, _recv(box, box.started - 1, request, meaning, self._pool)

    def check(self) -> None:
        """Raise UserCodeError if some receiver did not expect what this rank has sent."""
        for out in self._out.values():
            out.check()

    def close(self) -> None:
        """Stay until receivers have a hold of what was sent, or will not receive it any more."""
        end, bells = time.monotonic() + _LEAVE_WITHIN, self._bells
        bells.leave()
        bells.ring(tuple(self._in))
        while self._owing() and bells.news() is None and time.monotonic() < end:
            bells.doze()
            if self._owing():
                bells.sleep()
            bells.rise()
        for out in self._out.values():
            for lane in out.lanes:
                lane.segment.close()
        self._out, self._in = {}, {}

    def _owing(self) -> bool:
        """Whether a rank that may still receive has not seen all lanes to it."""
        late = [to for to, out in self._out.items() if not all(x.attached for x in out.lanes)]
        return any(not self._bells.left(to) and not self._peers.ended((to,)) for to in late)


def _send(out: _Outbox, number: int, cargo: Cargo, meaning: Meaning) -> Steps:
    while out.turn != number:
        yield None
    larger = out.larger(HEAD + cargo.size)
    if larger is not None:
        yield from _room(out)
        out.move(larger)
    yield from _room(out)
    lane = out.lanes[-1]
    lane.write_head(meaning.digest, cargo.size, meaning.words)
    done = 0
    while done < cargo.size:
        count = lane.load(cargo, done)
        if count:
            done += count
            out.publish()
        else:
            out.check()
            yield (), lane.position
    if not cargo.size:
        out.publish()
    out.turn += 1
    return ()


def _room(out: _Outbox) -> Generator[tuple[tuple[()], int], None, None]:
    """Until there is room for a head."""
    lane = out.lanes[-1]
    while lane.free() < HEAD:
        out.check()
        yield (), lane.position


def _recv(box: _Inbox, number: int, request: Start, meaning: Meaning, pool: Pool) -> Steps:
    while box.turn != number:
        _unbroken(box)
        yield None
    while True:
        lane = yield from _arrived(box)
        digest, size, words = lane.read_head()
        if digest != _MOVED:
            break
        box.release()
        box.follow(words)
    if digest != meaning.digest:
        sent, wanted = (w.rstrip(b"\0").decode(errors="replace") for w in (words, meaning.words))
        box.refuse(lane, fingerprint.differing(request.group.ranks, sent, wanted))
        _unbroken(box)
    pairs = zip(request.shapes, request.dtypes, strict=True)
    answers = tuple([pool.empty(shape, dtype) for shape, dtype in pairs])
    cargo, done = Cargo(answers), 0
    while done < size:
        count = lane.unload(cargo, done)
        if count:
            done += count
            box.release()
        else:
            yield (), lane.position
    if not size:
        box.release()
    box.turn += 1
    return answers


def _arrived(box: _Inbox) -> Generator[tuple[tuple[()], int] | None, None, Lane]:
    """The lane, once a message's head is there."""
    _unbroken(box)
    while (lane := box.find()) is None:
        yield None
    while lane.there() < HEAD:
        yield (), lane.position
    return lane


def _unbroken(box: _Inbox) -> None:
    if box.broken is not None:
        raise UserCodeError(box.broken)
