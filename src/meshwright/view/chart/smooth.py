"""Long series made short: means over runs of steps, ranges in them, a moving average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

__all__ = ["FEW", "Bin", "bins", "chunks", "smoothed"]

Point = tuple[int, float]
Item = TypeVar("Item")

# Below so many points each is shown by itself.
FEW = 20


@dataclass(frozen=True, slots=True)
class Bin:
    """Neighbouring points as one: the first and last step, and the values' least, mean, most."""

    first: int
    last: int
    least: float
    mean: float
    most: float

    @property
    def middle(self) -> float:
        """The step in the bin's middle."""
        return (self.first + self.last) / 2


def chunks(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """`items` cut into at most `most` runs of lengths that differ by one at most.

    >>> chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4, 5]]
    """
    count = min(most, len(items))
    edges = [len(items) * index // count for index in range(count + 1)] if count else [0]
    return [items[a:b] for a, b in pairwise(edges)]


def bins(points: Sequence[Point], most: int) -> tuple[Bin, ...]:
    """`points` (step, value) in at most `most` bins."""

    def one(run: Sequence[Point]) -> Bin:
        values = [value for _, value in run]
        return Bin(run[0][0], run[-1][0], min(values), sum(values) / len(values), max(values))

    return tuple(one(run) for run in chunks(points, most))


def smoothed(points: Sequence[Point]) -> tuple[Point, ...]:
    """Each point averaged with a hundredth of all on either side, which lags behind no slope.

    Fewer than `FEW` are left as they are: an average would hide what little there is.
    """
    count = len(points)
    if count < FEW:
        return tuple(points)
    reach = max(2, count // 100)
    sums = [0.0, *accumulate(value for _, value in points)]
    result = []
    for index, (step, _) in enumerate(points):
        first, stop = max(0, index - reach), min(count, index + reach + 1)
        result.append((step, (sums[stop] - sums[first]) / (stop - first)))
    return tuple(result)
