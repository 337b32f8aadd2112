"""Driving a generator of requests: what every driver does, whatever carries its data."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from meshwright.comm.base import MESSAGES, Exchange, Handle, Start, Wait
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
    """See that this rank may start `request`, and brings what such a request has.

    Raises:
        InternalError: it is no member, a tensor is not on the CPU, there are too few or too many,
            of several dtypes, or one is not of the shape that `request.shapes` gives it.
    """
    ranks = request.group.ranks
    if request.op in MESSAGES:
        _require_end(request, rank)
    if rank not in ranks:
        raise InternalError(
            f"rank {rank} starts {describe(request)}, whose members are ranks {list(ranks)}"
        )
    for tensor in request.tensors:
        if tensor.device.type != "cpu":
            raise InternalError(f"{describe(request)} is on {tensor.device}, and must be on CPU")
    problem = None if request.op in MESSAGES else _misfit(request, ranks.index(rank))
    if problem:
        raise InternalError(f"{describe(request)}: rank {rank} brings {problem}")


def _require_end(request: Start, rank: int) -> None:
    """See that this rank is at the right end of a message, which has something to carry."""
    source, *others = request.group.ranks
    if len(others) != 1 or source == others[0]:
        raise InternalError(
            f"{request.op} over {request.group.axis}: a message goes from one rank to another, "
            f"and its ranks are {list(request.group.ranks)}"
        )
    sends = request.op == "send"
    if rank != (source if sends else others[0]):
        raise InternalError(
            f"rank {rank} starts {describe(request)}, which is for "
            f"rank {source if sends else others[0]} to start"
        )
    if sends and not request.tensors:
        raise InternalError(f"{describe(request)} carries no tensor, and needs at least one")
    if not sends and (request.tensors or not request.shapes):
        raise InternalError(f"{describe(request)} takes shapes, at least one, and no tensors")
    if not sends and len(request.shapes) != len(request.dtypes):
        raise InternalError(
            f"{describe(request)} has {len(request.shapes)} shapes and {len(request.dtypes)} "
            "dtypes; give a dtype for each shape"
        )


def _misfit(request: Start, index: int) -> str | None:
    """What is wrong with what member `index` brings."""
    op, tensors, shapes, members = (
        request.op, request.tensors, request.shapes, len(request.group.ranks),
    )  # fmt: skip
    count = len(tensors)
    if op in _ONE or op == "barrier":
        if count != (op in _ONE):
            return f"{count} tensors, and {op} takes {int(op in _ONE)}"
    elif not count or (op in _PER_MEMBER and count % members):
        per = f", as many for each of {members} members" if op in _PER_MEMBER else ""
        return f"{count} tensors, and {op} takes at least one{per}"
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    if len(dtypes) > 1:
        return f"tensors of several dtypes: {', '.join(sorted(dtypes))}"
    if op in _TELLING and shapes:
        mine = [tuple(tensor.shape) for tensor in tensors]
        told = [tuple(shape) for shape in shapes[index * count : (index + 1) * count]]
        if mine != told:
            return f"shapes {mine}, and its request says {told}"
    return None


_ONE = frozenset({"broadcast", "permute"})
_PER_MEMBER = frozenset({"reduce_scatter", "all_to_all"})
_TELLING = frozenset({"all_gather", "permute"})
