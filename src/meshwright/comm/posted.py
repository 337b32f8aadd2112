"""Messages between ranks of one thread: a pair's n-th send meets its n-th recv.

How much a send may rely on is a choice, so that a schedule can be shown to need no buffers:

* `buffered`: what is sent is copied when the send is started, and its wait never waits
* `rendezvous`: the wait for a send lasts until the recv has been started
* `strict`: the start of a send does, too
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from torch import Tensor

from meshwright.comm import fingerprint
from meshwright.comm.base import Start
from meshwright.errors import InternalError

__all__ = ["Place", "Posted", "Sends"]

Sends = Literal["buffered", "rendezvous", "strict"]


class Place(NamedTuple):
    """One message: from, to, its number on that way."""

    source: int
    to: int
    number: int


@dataclass(slots=True, eq=False)
class _Message:
    """What is known of one message so far."""

    send: Start | None = None
    recv: Start | None = None
    carried: tuple[Tensor, ...] | None = None


@final
class Posted:
    """The messages under way."""

    def __init__(self, sends: Sends) -> None:
        """`sends`: when a send is done."""
        self._sends = sends
        self._started: dict[tuple[str, int, int], int] = defaultdict(int)
        self._messages: dict[Place, _Message] = {}

    def enter(self, start: Start) -> Place:
        """Note that a rank starts `start`.

        Raises:
            InternalError: its other half means another message.
        """
        source, to = start.group.ranks
        place = Place(source, to, self._started[start.op, source, to])
        self._started[start.op, source, to] += 1
        message = self._messages.setdefault(place, _Message())
        if start.op == "send":
            message.send = start
        else:
            message.recv = start
        if message.send is not None and message.recv is not None:
            sent, wanted = fingerprint.text(message.send), fingerprint.text(message.recv)
            if sent != wanted:
                raise InternalError(fingerprint.differing((source, to), sent, wanted))
        met = message.recv is not None
        if message.send is not None and message.carried is None and (met or self._keeps):
            message.carried = tuple(tensor.detach().clone() for tensor in message.send.tensors)
        return place

    def begun(self, start: Start, place: Place) -> bool:
        """Whether the rank that starts `start` may go on."""
        return start.op == "recv" or self._sends != "strict" or self.taken(place)

    def ready(self, start: Start, place: Place) -> tuple[Tensor, ...] | None:
        """What the wait for `start` answers, None as long as it lasts."""
        if start.op == "send":
            return () if self._keeps or self.taken(place) else None
        carried = self._messages[place].carried
        if carried is not None:
            del self._messages[place]
        return carried

    def taken(self, place: Place) -> bool:
        """Whether the recv of a message has been started."""
        message = self._messages.get(place)
        return message is None or message.recv is not None

    @property
    def _keeps(self) -> bool:
        return self._sends == "buffered"
