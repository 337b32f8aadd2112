"""Remat for a budget: the least work done again with which a rank never holds more than so much.

Few times matter, so only those get a row at which a solution without them holds too much, until
none does: what is found then is best under all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.predict.choice import Choice
from meshwright.predict.saving import Saving, account

__all__ = ["Best", "fitting", "least"]

_TIMES = 8
"""Rows added at once."""

_ROUNDS = 40
"""After which the search for rows is given up."""


@dataclass(frozen=True, slots=True)
class Best:
    """A choice: the storages that are saved, and whether it is proved that none is better."""

    kept: frozenset[int]
    proved: bool


def fitting(saving: Saving, limit: int) -> Best | None:
    """The choice that does the least work again within `limit` bytes; None if there is none."""
    times: set[int] = set()
    proved, allowed = True, limit
    for _ in range(_ROUNDS):
        found = Choice.of(saving, times).cheapest(allowed)
        if found.kept is None:
            return None
        proved = proved and found.proved
        told = account(saving, found.kept)
        if told.peak <= limit:
            return Best(found.kept, proved)
        over = [time for time, held in enumerate(told.bytes) if held > limit]
        new = _apart([t for t in over if t not in times], told.bytes)
        if not new:  # the solver's rounding: a few bytes of a million
            allowed -= told.peak - limit
        times.update(new)
    return None


def least(saving: Saving) -> Best:
    """The choice whose most bytes at once are fewest."""
    times: set[int] = set()
    best, proved = frozenset(saving.storages), True
    for _ in range(_ROUNDS):
        found = Choice.of(saving, times).smallest()
        if found.kept is None:
            break
        told = account(saving, found.kept)
        if told.peak < account(saving, best).peak:
            best = found.kept
        proved = proved and found.proved
        over = [t for t, held in enumerate(told.bytes) if held > found.bytes * (1 + 1e-6) + 1]
        new = _apart([t for t in over if t not in times], told.bytes)
        if not new:
            return Best(best, proved)
        times.update(new)
    return Best(best, proved=False)


def _apart(times: Sequence[int], held: Sequence[int]) -> list[int]:
    """The worst times, those next to a worse one left out."""
    found: list[int] = []
    for time in sorted(times, key=lambda t: -held[t]):
        if all(abs(time - other) > 3 for other in found):
            found.append(time)
        if len(found) == _TIMES:
            break
    return found
