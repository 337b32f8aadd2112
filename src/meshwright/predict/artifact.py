"""Artifact: what PipeDream's published optimizer computes, which is not what its paper says.

It *adds* compute and all-reduce where the paper takes the longer, counts an all-reduce of m as
4 (m - 1) / m of the weights' bytes (divided, for a stage that is alone, by the units of the level
below), and sends activations only if it is told by how much they are compressed; then each of m
replicas sends its part at once. What crosses a cut it counts too high where branches meet. Use it
to compare with its published numbers, and `partition` for plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshwright.predict.antichain import State, antichains, members
from meshwright.predict.layers import LayerGraph
from meshwright.predict.machine import Level
from meshwright.predict.partition import Partition, solved
from meshwright.predict.profile import computing
from meshwright.predict.recurrence import solve

__all__ = ["artifact"]


def artifact(
    graph: LayerGraph,
    levels: Sequence[Level],
    *,
    straight: bool = False,
    compression: float | None = None,
) -> Partition:
    """The published optimizer's partition; its layers are numbered in `computing(graph)`.

    Args:
        graph: a profile, as it was read.
        levels: innermost first.
        straight: no stage has more than one unit.
        compression: of activations; None leaves their transfers out.

    Raises:
        PlanError: there are fewer places to cut at than the stages need.
    """
    graph = computing(graph)
    states = _published(graph, antichains(graph))
    found = solve(states, levels, lambda s: _Rule(s, levels, compression), straight=straight)
    return solved(found, states, levels)


@dataclass(frozen=True, slots=True)
class _Rule:
    states: Sequence[State]
    levels: Sequence[Level]
    compression: float | None

    def stage(self, level: int, inner: float, weights: float, units: int, *, alone: bool) -> float:
        reduced = 4 * (units - 1) * weights / (self.levels[level].bandwidth * units)
        if alone and level:
            reduced /= self.levels[level - 1].units
        return (inner + reduced) / units

    def sent(self, level: int, split: int, last: int, units: int) -> float:
        if self.compression is None:
            return 0.0
        ends = last == len(self.states) - 1
        crossing = max(self.states[split].output, 0.0 if ends else self.states[last].output)
        return 2 * crossing / (self.levels[level].bandwidth * units * self.compression)


def _published(graph: LayerGraph, states: Sequence[State]) -> tuple[State, ...]:
    """The states with the output that the published optimizer counts."""
    readers = graph.readers()
    before = _ancestors(graph)
    return tuple(
        replace(state, output=_output(graph, state.mask, readers, before)) for state in states
    )


def _output(
    graph: LayerGraph, mask: int, readers: Sequence[Sequence[int]], before: Sequence[int]
) -> float:
    """Activations of a state's last layers, and of those that one of them is not alone to follow.

    The latter counts a layer whose other reader is inside, but not before the same last layer.
    """
    inner = 0
    for layer in members(mask):
        inner |= before[layer]
    counted = last = mask & ~inner
    for end in members(last):
        for layer in members(before[end]):
            if any(r != end and not before[end] >> r & 1 for r in readers[layer]):
                counted |= 1 << layer
    return sum(graph.layers[layer].activations for layer in members(counted))


def _ancestors(graph: LayerGraph) -> list[int]:
    """Of each layer, all before it, as bits."""
    found = [0] * len(graph.layers)
    makers = graph.makers()
    for number in graph.order():
        for maker in makers[number]:
            found[number] |= found[maker] | 1 << maker
    return found
