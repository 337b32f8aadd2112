"""Exchanges side by side: one goes on while others wait for their collectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

from meshwright.comm.base import Start, Wait

__all__ = ["beside"]

Exchange = Generator[Any, Any, None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    exchange: Exchange
    request: Wait
    weight: int


def beside(exchanges: Iterable[tuple[int, Exchange]], limit: int) -> Exchange:
    """Run (weight, exchange) after exchange, as many beside each other as weigh `limit` together.

    Each is begun in its turn and goes on until it waits; the one that waits longest goes on first,
    so that every rank that has the same exchanges asks for their collectives in the same order.
    """
    waiting: deque[_Waiting] = deque()
    for weight, exchange in exchanges:
        while waiting and sum(other.weight for other in waiting) + weight > limit:
            yield from _resume(waiting)
        yield from _advance(waiting, exchange, None, weight)
    while waiting:
        yield from _resume(waiting)


def _resume(waiting: deque[_Waiting]) -> Exchange:
    """Wait for what the first one waits for, and let it go on until it waits again."""
    first = waiting.popleft()
    try:
        answer = yield first.request
    except BaseException as error:
        first.exchange.throw(error)
        raise
    yield from _advance(waiting, first.exchange, answer, first.weight)


def _advance(waiting: deque[_Waiting], exchange: Exchange, answer: Any, weight: int) -> Exchange:
    """Send an answer to an exchange and begin what it asks for, until it waits or ends."""
    try:
        request = exchange.send(answer)
        while isinstance(request, Start):
            try:
                answer = yield request
            except BaseException as error:
                exchange.throw(error)
                raise
            request = exchange.send(answer)
    except StopIteration:
        return
    waiting.append(_Waiting(exchange, request, weight))
