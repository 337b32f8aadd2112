"""What repeated measurements say: a median, its 95 % interval, and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HOLDS, MISSES, OPEN = "holds", "misses", "not resolved"
FEWEST = 6  # below, no order statistics enclose the median with 95 %

Sense = Literal["at least", "at most", "within"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median of `n` values and the interval that holds the true one in 95 of 100 cases."""

    median: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The median and its interval by order statistics; below `FEWEST` the interval is open.

    The k-th smallest and the k-th largest of n values enclose the median of what they are drawn
    from with probability 1 - 2 P(Binomial(n, 1/2) < k), whatever its distribution; k is the largest
    for which that is at least 0.95.
    """
    ordered, n = sorted(values), len(values)
    if n < FEWEST:
        return Estimate(statistics.median(ordered), -math.inf, math.inf, n)
    k = enclosing(n)
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k], n)


def enclosing(n: int) -> int:
    """The largest k for which the k-th values from both ends enclose the median with 95 %."""
    below, k = 0.0, 0
    while 2 * (below + math.comb(n, k) / 2**n) <= 0.05:
        below += math.comb(n, k) / 2**n
        k += 1
    return k


def verdict(found: Estimate, target: float, sense: Sense) -> str:
    """Whether the whole interval is on one side of the target, or across it.

    Args:
        found: the estimate.
        target: the bound; for `within`, how far from 1.
        sense: on which side the target is met.
    """
    match sense:
        case "at least":
            return HOLDS if found.low >= target else MISSES if found.high < target else OPEN
        case "at most":
            return HOLDS if found.high <= target else MISSES if found.low > target else OPEN
        case "within":
            low, high = 1 - target, 1 + target
            inside = low <= found.low and found.high <= high
            return HOLDS if inside else MISSES if found.high < low or found.low > high else OPEN
