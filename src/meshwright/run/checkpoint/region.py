"""Boxes of a tensor: intersection, and whether a set of boxes tiles a shape. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["Region", "bands", "intersect", "overlap", "span", "whole"]

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


def span(box: Region, shape: tuple[int, ...]) -> tuple[int, int]:
    """From which to before which element, in row-major order, a box of a tensor of `shape` lies."""
    low = high = 0
    for start, count, size in zip(box.start, box.shape, shape, strict=True):
        low, high = low * size + start, high * size + start + count - 1
    return (low, high + 1) if box.volume else (low, low)


def bands(box: Region, shape: tuple[int, ...], most: int) -> Iterator[Region]:
    """A box in parts whose spans are at most `most` elements, cut along the outer dims."""
    low, high = span(box, shape)
    if high - low <= most or box.volume == 1:
        yield box
        return
    dim = next(dim for dim, count in enumerate(box.shape) if count > 1)
    count = max(1, most // max(1, math.prod(shape[dim + 1 :])))
    for first in range(0, box.shape[dim], count):
        start, size = list(box.start), list(box.shape)
        start[dim] += first
        size[dim] = min(count, box.shape[dim] - first)
        yield from bands(Region(tuple(start), tuple(size)), shape, most)


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
