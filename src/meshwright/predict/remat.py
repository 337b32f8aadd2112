"""Remat for a budget: the least work done again with which a rank never holds more than so much.

Few times matter, so only those get a row at which a solution without them holds too much, until
none does: what is found then is best under all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.predict.choice import NODES, Choice
from meshwright.predict.saving import Saving, account

__all__ = ["Best", "fitting", "least"]

_TIMES = 8
"""Rows added at once."""

_ROUNDS = 40
"""After which the search for rows is given up."""

_FEW_NODES = NODES // 20
"""Of a search tree, where only whether there is a choice is asked."""


@dataclass(frozen=True, slots=True)
class Best:
    """A choice: the storages that are saved, and whether it is proved that none is better."""

    kept: frozenset[int]
    proved: bool


def fitting(saving: Saving, limit: int) -> Best | None:
    """The choice that does the least work again within `limit` bytes; None if none is found."""
    return _within(saving, limit, set(), NODES)[0]


def least(saving: Saving) -> Best:
    """The choice whose most bytes at once are fewest, to a two hundredth of them."""
    times: set[int] = set()
    ends = (frozenset(saving.storages), frozenset[int]())
    best = min(ends, key=lambda kept: account(saving, kept).peak)
    low, high, proved = -1, account(saving, best).peak, True
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        found, sure = _within(saving, middle, times, _FEW_NODES)
        if found is None:
            low, proved = middle, proved and sure
        else:
            best, high = found.kept, account(saving, found.kept).peak
    return Best(best, proved)


def _within(saving: Saving, limit: int, times: set[int], nodes: int) -> tuple[Best | None, bool]:
    """The best choice found within a limit; whether it is best, or that there is none, is proved.

    Times that are found to matter are added to `times`.
    """
    proved, allowed = True, limit
    for _ in range(_ROUNDS):
        found = Choice.of(saving, times).cheapest(allowed, nodes)
        proved = proved and found.proved
        if found.kept is None:
            return None, proved
        told = account(saving, found.kept)
        if told.peak <= limit:
            return Best(found.kept, proved), proved
        over = [time for time, held in enumerate(told.bytes) if held > limit]
        new = _apart([t for t in over if t not in times], told.bytes)
        if not new:  # the solver's rounding: a few bytes of a million
            allowed -= told.peak - limit
        times.update(new)
    return None, False


def _apart(times: Sequence[int], held: Sequence[int]) -> list[int]:
    """The worst times, those next to a worse one left out."""
    found: list[int] = []
    for time in sorted(times, key=lambda t: -held[t]):
        if all(abs(time - other) > 3 for other in found):
            found.append(time)
        if len(found) == _TIMES:
            break
    return found
