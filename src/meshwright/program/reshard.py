r"""From one layout to another: the cheapest sequence of single-axis steps.

    from \\ to      replicated      sharded            partial
    replicated     -               slice (free)       mask: keep at coordinate 0 (free)
    sharded        all_gather      all_to_all, or     all_gather, mask
                                   gather + slice
    partial        all_reduce      reduce_scatter     all_reduce, mask

Searched by Dijkstra over the layouts reachable by changing one axis at a time; the cost is bytes
received per rank, so that local steps are free and the order of axes is the cheapest legal one.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from meshwright.errors import InternalError
from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Partial, Placement, Shard, disjoint, respelled

__all__ = ["Step", "reshard", "step_cost"]

Kind = Literal["all_gather", "all_reduce", "reduce_scatter", "all_to_all", "slice", "mask"]


@dataclass(frozen=True, slots=True)
class Step:
    """One collective (or local) move over `axis`, from layout `before` to layout `after`."""

    kind: Kind
    axis: str
    before: Layout
    after: Layout


def reshard(
    shape: tuple[int, ...], axes: Sequence[Axis], before: Layout, after: Layout
) -> tuple[Step, ...]:
    """The cheapest steps that bring a value of global `shape` from one layout to the other."""
    before = respelled(shape, before, after, axes)
    if before == after:
        return ()
    tie = itertools.count()
    queue: list[tuple[float, int, Layout, tuple[Step, ...]]] = [(0.0, next(tie), before, ())]
    done: set[Layout] = set()
    while queue:
        cost, _, here, steps = heapq.heappop(queue)
        if here == after:
            return steps
        if here in done:
            continue
        done.add(here)
        for step in _moves(shape, axes, here, after):
            # A small charge per step keeps free detours out.
            total = cost + step_cost(shape, axes, step) + 1e-3
            heapq.heappush(queue, (total, next(tie), step.after, (*steps, step)))
    raise InternalError(f"no way from {before} to {after} for shape {shape}")


def step_cost(shape: tuple[int, ...], axes: Sequence[Axis], step: Step) -> float:
    """Elements that each rank receives, to first order (even chunks)."""
    sizes = {axis.name: axis.size for axis in axes}
    size = sizes[step.axis]
    held = float(math.prod(shape))
    for name, place in step.before.placements:
        if isinstance(place, Shard) and name != step.axis:
            held /= sizes[name]
    share = (size - 1) / size
    match step.kind:
        case "all_reduce":
            return 2 * share * held
        case "all_gather" | "reduce_scatter":
            return share * held
        case "all_to_all":
            return share * held / size
        case "slice" | "mask":
            return 0.0


def _moves(
    shape: tuple[int, ...], axes: Sequence[Axis], here: Layout, goal: Layout
) -> Iterator[Step]:
    for axis in axes:
        name = axis.name
        place, wanted = here.on(name), goal.on(name)
        targets: list[Placement] = [None] if place is not None else []
        if wanted != place and wanted is not None:
            targets.append(wanted)
        for target in targets:
            kind = _kind(place, target)
            if kind is None or not _legal(shape, axes, here, name, place, target):
                continue
            yield Step(kind, name, here, here.change(axes, name, target))


def _kind(place: Placement, target: Placement) -> Kind | None:
    match place, target:
        case None, Shard():
            return "slice"
        case None, Partial():
            return "mask"
        case Shard(), None:
            return "all_gather"
        case Shard(), Shard() if place.dim != target.dim:
            return "all_to_all"
        case Partial(), None:
            return "all_reduce"
        case Partial(), Shard():
            return "reduce_scatter"
    return None


def _legal(
    shape: tuple[int, ...],
    axes: Sequence[Axis],
    here: Layout,
    axis: str,
    place: Placement,
    target: Placement,
) -> bool:
    """Only the innermost axis of a factor may be gathered, and a new one must become innermost."""
    names = [a.name for a in axes]
    later = [here.on(name) for name in names[names.index(axis) + 1 :]]
    if isinstance(place, Shard) and place in later:
        return False
    if isinstance(target, Shard):
        if target in later:
            return False
        others = [here.on(name) for name in names if name != axis]
        return all(
            disjoint(shape[target.dim], target, other)
            for other in others
            if isinstance(other, Shard) and other.dim == target.dim and other != target
        )
    return True
