"""Layout: how one value lies over the mesh axes.

Per axis a value is sharded, replicated (not mentioned) or partial (it still owes a reduction).

    Shard(dim)                       dim split into near-equal contiguous chunks
    Shard(dim, outer=3, unit=64)     dim seen as (outer, n, unit); the factor n is split in chunks:
                                     a fused qkv is (3, heads, head size), a flattened batch is
                                     (1, samples, tokens)

    Fused(dim, parts)                parts side by side, each split in its own way or whole on every
                                     rank: queries of many heads, then one key and one value

Chunks differ by at most one granule; earlier coordinates get the larger ones. Axes that share a
factor nest, in mesh order: the later axis splits what the earlier one left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from meshwright.plan.mesh import Axis

__all__ = [
    "REPLICATED",
    "Bounds",
    "Fused",
    "Layout",
    "Partial",
    "Placement",
    "Shard",
    "Slab",
    "Split",
    "chunk",
    "counted",
    "disjoint",
    "local_shape",
    "pieces",
    "primary",
    "respelled",
    "slab",
]


Bounds = tuple[tuple[int, int], ...]
"""(start, length) per dim."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Dim `dim`, seen as (outer, n, unit), has its factor n split over the axis."""

    dim: int
    outer: int = 1
    unit: int = 1

    def granules(self, size: int) -> int:
        """The factor n of a dim of `size`."""
        return size // (self.outer * self.unit)


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank holds a term; the value is their reduction."""

    op: Literal["sum", "max", "min"] = "sum"


@dataclass(frozen=True, slots=True)
class Fused:
    """Dim `dim` is parts side by side: (size, how it is split) of each; None is whole everywhere.

    A rank holds its pieces of the parts one after another. Only state at rest lies so: programs
    have an input for each part.
    """

    dim: int
    parts: tuple[tuple[int, Shard | None], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the parts."""
        return tuple(size for size, _ in self.parts)

    def splits(self, place: int) -> bool:
        """Whether the part in which `place` of the dim lies is split."""
        ends = itertools.accumulate(self.sizes)
        return next(
            s is not None for end, (_, s) in zip(ends, self.parts, strict=True) if place < end
        )


Placement = Shard | Partial | Fused | None


@dataclass(frozen=True, slots=True)
class Layout:
    """(axis, placement) for every axis over which the value is not replicated, in mesh order."""

    placements: tuple[tuple[str, Shard | Partial | Fused], ...] = ()

    @classmethod
    def of(cls, axes: Sequence[Axis], placements: Mapping[str, Placement]) -> Layout:
        """The layout with these placements, ordered as the mesh's axes are."""
        found = ((axis.name, placements.get(axis.name)) for axis in axes)
        return cls(tuple((name, place) for name, place in found if place is not None))

    def on(self, axis: str) -> Placement:
        """Placement over `axis`; None is replicated."""
        return next((place for name, place in self.placements if name == axis), None)

    def change(self, axes: Sequence[Axis], axis: str, placement: Placement) -> Layout:
        """This layout with another placement over one axis."""
        return Layout.of(axes, {**dict(self.placements), axis: placement})

    @property
    def fused(self) -> bool:
        """Whether it is a layout of parts."""
        return any(isinstance(place, Fused) for _, place in self.placements)

    @property
    def partial_axes(self) -> tuple[str, ...]:
        """Axes over which a reduction is owed."""
        return tuple(name for name, place in self.placements if isinstance(place, Partial))

    def __str__(self) -> str:
        """`replicated`, `sharded(0) over data`, `partial(sum) over data`."""
        return ", ".join(_words(name, place) for name, place in self.placements) or "replicated"


def _words(axis: str, place: Shard | Partial | Fused) -> str:
    match place:
        case Partial():
            return f"partial({place.op}) over {axis}"
        case Shard():
            return f"sharded({place.dim}{_inner(place)}) over {axis}"
    ends = itertools.accumulate(place.sizes)
    told = [
        f"{end - size}:{end} " + ("whole" if shard is None else f"sharded{_inner(shard)}")
        for end, (size, shard) in zip(ends, place.parts, strict=True)
    ]
    return f"fused({place.dim}: {'; '.join(told)}) over {axis}"


def _inner(shard: Shard) -> str:
    return f" in ({shard.outer}, n, {shard.unit})" if shard.outer * shard.unit > 1 else ""


REPLICATED = Layout()


def chunk(n: int, parts: int, index: int) -> tuple[int, int]:
    """(start, length) of part `index` of n granules in `parts` near-equal contiguous parts."""
    each, more = divmod(n, parts)
    return index * each + min(index, more), each + (index < more)


@dataclass(frozen=True, slots=True)
class Slab:
    """What one axis does to a dim of the *local* tensor: (outer, n, unit), n in `lengths`.

    `starts` and `lengths` are in granules, per coordinate along the axis; `n` is their sum.
    """

    dim: int
    outer: int
    unit: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def n(self) -> int:
        """Granules over all coordinates."""
        return sum(self.lengths)


def _granules(
    shape: tuple[int, ...],
    layout: Layout,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
    shard: Shard,
    before: str | None,
) -> int:
    """Granules of the factor that `shard` splits, left by the axes that come before `before`."""
    n = shard.granules(shape[shard.dim])
    for axis in axes:
        if axis.name == before:
            break
        if layout.on(axis.name) == shard:
            _, n = chunk(n, axis.size, coordinates[axis.name])
    return n


class Split(Protocol):
    """A factor of a dim: the dim seen as (outer, n, unit)."""

    @property
    def outer(self) -> int:
        """What lies before the factor."""

    @property
    def unit(self) -> int:
        """What lies behind it."""


def disjoint(size: int, a: Split, b: Split) -> bool:
    """Whether one split lies inside the other's unit, so that each can be cut on its own."""
    return a.unit % (size // b.outer) == 0 or b.unit % (size // a.outer) == 0


def local_shape(
    shape: tuple[int, ...],
    layout: Layout,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
) -> tuple[int, ...]:
    """The shape that the rank at `coordinates` holds of a value of global `shape`."""
    local = list(shape)
    for shard in dict.fromkeys(p for _, p in layout.placements if isinstance(p, Shard)):
        whole = shard.granules(shape[shard.dim])
        left = _granules(shape, layout, axes, coordinates, shard, None)
        local[shard.dim] = local[shard.dim] // whole * left if whole else 0
    for axis, place in layout.placements:
        if isinstance(place, Fused):
            parts = _part_runs(axis, place, axes, coordinates)
            local[place.dim] = sum(length for _, length in parts)
    return tuple(local)


def slab(
    shape: tuple[int, ...],
    layout: Layout,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
    axis: str,
    shard: Shard,
) -> Slab:
    """How `shard` over `axis` lies in the tensor held under `layout` without that axis.

    `layout` holds the other axes' placements (what it says of `axis` is not looked at).
    """
    rest = Layout(tuple((n, p) for n, p in layout.placements if n != axis))
    outer, unit = shard.outer, shard.unit
    for other in dict.fromkeys(p for _, p in rest.placements if isinstance(p, Shard)):
        if other.dim != shard.dim or other == shard:
            continue
        whole = other.granules(shape[other.dim])
        left = _granules(shape, rest, axes, coordinates, other, None)
        if other.unit >= shard.unit * shard.granules(shape[shard.dim]):
            outer = outer // whole * left
        else:
            unit = unit // whole * left
    n = _granules(shape, rest, axes, coordinates, shard, axis)
    size = next(a.size for a in axes if a.name == axis)
    parts = [chunk(n, size, k) for k in range(size)]
    starts, lengths = zip(*parts, strict=True)
    return Slab(shard.dim, outer, unit, starts, lengths)


def pieces(
    shape: tuple[int, ...],
    layout: Layout,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
) -> Iterator[tuple[Bounds, Bounds]]:
    """The boxes that a rank holds of a value: (bounds in the whole value, bounds in its part).

    One box, but for layouts with an outer factor: of a fused qkv split in heads there are three.
    """
    runs = [_runs(dim, size, layout, axes, coordinates) for dim, size in enumerate(shape)]
    for found in itertools.product(*runs):
        yield tuple(run[0] for run in found), tuple(run[1] for run in found)


def _runs(
    dim: int, size: int, layout: Layout, axes: Sequence[Axis], coordinates: Mapping[str, int]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((start, length) in the dim, the same in the rank's part of it) of every run."""
    fused = [(a, p) for a, p in layout.placements if isinstance(p, Fused) and p.dim == dim]
    found = (
        _part_runs(*fused[0], axes, coordinates)
        if fused
        else _shard_runs(dim, size, layout, axes, coordinates)
    )
    begins = itertools.accumulate((length for _, length in found), initial=0)
    return [(run, (begin, run[1])) for run, begin in zip(found, begins, strict=False)]


def _part_runs(
    axis: str, fused: Fused, axes: Sequence[Axis], coordinates: Mapping[str, int]
) -> list[tuple[int, int]]:
    """(start, length) of every run of a fused dim; none goes over the border of two parts."""
    found, start = [], 0
    for size, shard in fused.parts:
        lies = Layout() if shard is None else Layout(((axis, shard),))
        runs = _shard_runs(fused.dim, size, lies, axes, coordinates)
        found += [(start + begin, length) for begin, length in runs if length]
        start += size
    return found


def _shard_runs(
    dim: int, size: int, layout: Layout, axes: Sequence[Axis], coordinates: Mapping[str, int]
) -> list[tuple[int, int]]:
    """(start, length) of every run of a dim that shards leave a rank."""
    shards = {p for _, p in layout.placements if isinstance(p, Shard) and p.dim == dim}
    runs = [(0, size)]
    # From coarse to fine: a finer factor repeats within each unit of a coarser one.
    for shard in sorted(shards, key=lambda s: (s.unit * s.granules(size), s.unit), reverse=True):
        first, count = 0, shard.granules(size)
        block = count * shard.unit
        for axis in axes:
            if layout.on(axis.name) == shard:
                skipped, count = chunk(count, axis.size, coordinates[axis.name])
                first += skipped
        cut = (first * shard.unit, count * shard.unit)
        runs = [
            (start + cut[0], cut[1])
            for begin, length in runs
            for start in range(begin, begin + length, block or 1)
        ]
    merged: list[tuple[int, int]] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged


def primary(
    layout: Layout,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
    at: Bounds | None = None,
) -> bool:
    """Whether this rank keeps the replica that counts of a value, or of its box `at`."""

    def split(place: Placement) -> bool:
        if isinstance(place, Fused):
            return at is None or place.splits(at[place.dim][0])
        return isinstance(place, Shard)

    return all(coordinates[a.name] == 0 for a in axes if not split(layout.on(a.name)))


def counted(
    shape: tuple[int, ...], layout: Layout, axes: Sequence[Axis], coordinates: Mapping[str, int]
) -> tuple[Bounds, ...]:
    """The boxes of a rank's part that count, so that over all ranks each element counts once."""
    if layout.fused:
        found = pieces(shape, layout, axes, coordinates)
        return tuple(here for at, here in found if primary(layout, axes, coordinates, at))
    held = local_shape(shape, layout, axes, coordinates)
    return (tuple((0, n) for n in held),) if primary(layout, axes, coordinates) else ()


def respelled(shape: tuple[int, ...], here: Layout, like: Layout, axes: Sequence[Axis]) -> Layout:
    """`here` with shards written as in `like` where both cut at the same places.

    Two of 4 heads are the same elements as one of 2 pairs of heads.
    """
    spelled: dict[str, Shard] = {}
    for axis in axes:
        mine, other = here.on(axis.name), like.on(axis.name)
        if not isinstance(mine, Shard) or not isinstance(other, Shard) or mine == other:
            continue
        if (mine.dim, mine.outer) != (other.dim, other.outer):
            continue
        before = [a for a in axes[: axes.index(axis)] if here.on(a.name) == mine]
        if before != [a for a in axes[: axes.index(axis)] if like.on(a.name) == other]:
            continue
        parts = math.prod(a.size for a in before) * axis.size
        if mine.granules(shape[mine.dim]) % parts == 0 == other.granules(shape[mine.dim]) % parts:
            spelled[axis.name] = other
    for name, mine in here.placements:  # axes that share a factor are written alike, or not at all
        if name not in spelled and mine in {here.on(other) for other in spelled}:
            spelled = {n: p for n, p in spelled.items() if here.on(n) != mine}
    found = Layout.of(axes, {**dict(here.placements), **spelled})
    return found if _apart(shape, found) else here


def _apart(shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether shards of one dim are the same factor, or each can be cut on its own."""
    shards = {place for _, place in layout.placements if isinstance(place, Shard)}
    return all(
        disjoint(shape[a.dim], a, b) for a, b in itertools.combinations(shards, 2) if a.dim == b.dim
    )


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)
