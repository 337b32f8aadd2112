"""Boxes of a tensor: intersection, and whether a set of boxes tiles a shape. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["Region", "intersect", "overlap", "whole"]

# A grid is cut apart in as many rounds as it has dims. Boxes that no straight cut separates are
# compared pair by pair; a real layout never has many, a hostile manifest may.
_DIMS = 16
_TANGLED = 1024


@dataclass(frozen=True, slots=True)
class Region:
    """The box [start, start + shape) of a tensor, one number per dim, in elements."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """The first index past the box, per dim."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    @property
    def volume(self) -> int:
        """How many elements the box has (1 for a scalar)."""
        return math.prod(self.shape)

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether the box lies in a tensor of `shape`."""
        return len(self.start) == len(self.shape) == len(shape) and all(
            a >= 0 and n >= 0 and a + n <= size
            for a, n, size in zip(self.start, self.shape, shape, strict=True)
        )

    def slices(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """The box as slices of a tensor whose first element is at `origin`."""
        return tuple(
            slice(a - o, a - o + n) for a, o, n in zip(self.start, origin, self.shape, strict=True)
        )


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor of `shape`."""
    return Region((0,) * len(shape), shape)


def intersect(one: Region, two: Region) -> Region | None:
    """The box that both share, or None where they share no element."""
    start = tuple(map(max, one.start, two.start))
    stop = tuple(map(min, one.stop, two.stop))
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    return None if any(n <= 0 for n in shape) else Region(start, shape)


def overlap(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    """Two of `regions` (equal ranks, none empty) that share an element, or None.

    Cuts the set by straight lines as long as one separates it; layouts are grids, so this is
    O(n log n) for them. What no line separates is compared pair by pair.

    Raises:
        ValueError: too many boxes that no line separates (no layout makes such).
    """
    heap = [list(regions)]
    budget = 2 * _DIMS * len(regions)
    while heap:
        boxes = heap.pop()
        parts = _cut(boxes) if len(boxes) > 1 else [boxes]
        if len(boxes) > _TANGLED:
            budget -= len(boxes)
        if budget < 0 or (len(parts) == 1 and len(boxes) > _TANGLED):
            raise ValueError(f"{len(boxes)} pieces overlap or interlock")
        if len(parts) > 1:
            heap.extend(parts)
        elif (pair := _first_pair(boxes)) is not None:
            return pair
    return None


def _cut(boxes: list[Region]) -> list[list[Region]]:
    """The boxes split by all lines, across one dim, that touch none of them."""
    for dim in range(len(boxes[0].shape)):
        parts: list[list[Region]] = []
        reach = -1
        for start, _, box in sorted((b.start[dim], i, b) for i, b in enumerate(boxes)):
            if start >= reach:
                parts.append([])
            parts[-1].append(box)
            reach = max(reach, start + box.shape[dim])
        if len(parts) > 1:
            return parts
    return [boxes]


def _first_pair(boxes: list[Region]) -> tuple[Region, Region] | None:
    for one, two in combinations(boxes, 2):
        if intersect(one, two) is not None:
            return one, two
    return None
