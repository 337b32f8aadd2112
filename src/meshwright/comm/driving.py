"""Driving a generator of requests: what every driver does, whatever carries its data."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from meshwright.comm.base import Exchange, Handle, Start, Wait
from meshwright.comm.ledger import describe
from meshwright.errors import InternalError

__all__ = ["Performer", "advance", "perform", "require_mine"]


class Performer(Protocol):
    """What answers requests."""

    def start(self, request: Start) -> Handle:
        """Begin a collective."""

    def wait(self, request: Wait) -> tuple[Tensor, ...]:
        """Finish one."""


def perform(performer: Performer, exchange: Exchange, answer: Any = None) -> Any:
    """Drive `exchange` until it returns, and return its value.

    Raises:
        InternalError: it yielded what is no request.
    """
    try:
        thing = _drive(performer, exchange, answer)
    except StopIteration as end:
        return end.value
    raise InternalError(f"the exchange yielded {thing!r}, which is no request")


def advance(performer: Performer, exchange: Exchange, answer: Any = None) -> Any:
    """Drive `exchange` until it yields something that is no request, and return that.

    If the exchange returns instead, so does this, with its value.
    """
    try:
        return _drive(performer, exchange, answer)
    except StopIteration as end:
        return end.value


def _drive(performer: Performer, exchange: Exchange, answer: Any) -> Any:
    """Perform requests until another thing is yielded; StopIteration when it ends."""
    thing = exchange.send(answer)
    while True:
        try:
            if isinstance(thing, Start):
                answer = performer.start(thing)
            elif isinstance(thing, Wait):
                answer = performer.wait(thing)
            else:
                return thing
        except Exception as error:  # noqa: BLE001  the generator decides what to do with it
            thing = exchange.throw(error)
        else:
            thing = exchange.send(answer)


def require_mine(request: Start, rank: int) -> None:
    """See that this rank may start `request`.

    Raises:
        InternalError: it is no member, or a tensor is not on the CPU.
    """
    ranks = request.group.ranks
    if rank not in ranks:
        raise InternalError(
            f"rank {rank} starts {describe(request)}, whose members are ranks {list(ranks)}"
        )
    for tensor in request.tensors:
        if tensor.device.type != "cpu":
            raise InternalError(f"{describe(request)} is on {tensor.device}, and must be on CPU")
