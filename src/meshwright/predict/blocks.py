"""Blocks: costs in a row, cut into blocks in a row whose largest is as small as can be.

Of all such cuts, the one whose blocks are most even (whose squares sum to the least).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from meshwright.errors import PlanError

__all__ = ["blocks"]

_SLACK = 1 + 1e-12
"""Sums of fractions being what they are."""


def blocks(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """Where each of `count` blocks begins; every block has one cost at least.

    Raises:
        PlanError: there are fewer costs than blocks, no blocks, or a cost that is none.
    """
    for number, cost in enumerate(costs):
        if not math.isfinite(cost) or cost < 0:
            raise PlanError(
                f"layer {number} costs {cost}; costs are finite and not negative: measure it again"
            )
    if not 1 <= count <= len(costs):
        raise PlanError(
            f"{len(costs)} layers cannot be cut into {count} blocks of one layer or more; use "
            f"between 1 and {len(costs)}"
        )
    sums = [0.0, *accumulate(costs)]
    return _evenest(sums, count, _smallest(sums, count) * _SLACK)


def _smallest(sums: Sequence[float], count: int) -> float:
    """The least that the largest block can be."""
    items = len(sums) - 1
    least = sums[:]  # of the costs before each place, in as many blocks as have been made
    for made in range(2, count + 1):
        found = [math.inf] * (items + 1)
        for end in range(made, items + 1):
            # The earlier blocks' largest grows with their end and the last block shrinks: the best
            # lies where they meet.
            low, high = made - 1, end - 1
            while low < high:
                middle = (low + high) // 2
                if least[middle] < sums[end] - sums[middle]:
                    low = middle + 1
                else:
                    high = middle
            tried = range(max(low - 1, made - 1), low + 1)
            found[end] = min(max(least[at], sums[end] - sums[at]) for at in tried)
        least = found
    return least[items]


def _evenest(sums: Sequence[float], count: int, largest: float) -> tuple[int, ...]:
    """The beginnings of blocks of `largest` at most, that have the least sum of squares."""
    items = len(sums) - 1
    squares = [math.inf] * (items + 1)
    squares[0] = 0.0
    begins: list[list[int]] = []
    for made in range(1, count + 1):
        found, begin = [math.inf] * (items + 1), [0] * (items + 1)
        for end in range(made, items + 1):
            start = max(made - 1, bisect_left(sums, sums[end] - largest) - 1)
            for at in range(start, end):
                size = sums[end] - sums[at]
                if size <= largest and squares[at] + size * size < found[end]:
                    found[end], begin[end] = squares[at] + size * size, at
        squares = found
        begins.append(begin)
    places, end = [], items
    for begin in reversed(begins):
        end = begin[end]
        places.append(end)
    return tuple(reversed(places))
