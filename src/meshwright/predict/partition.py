"""Partition: which layers make a stage and how many workers do it, so that the slowest is fastest.

PipeDream's recurrence (SOSP'19, section 3.1): per mini-batch, m units side by side take the longer
of their compute and of their all-reduce, of 2 (m - 1) / m of the weights' bytes, by m; a cut takes
twice what crosses it, there and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.predict.antichain import State, antichains, members
from meshwright.predict.layers import LayerGraph
from meshwright.predict.machine import Level, Memory
from meshwright.predict.recurrence import Recurrence, solve

__all__ = ["Partition", "Stage", "partition", "solved"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        layers: their numbers in the graph.
        shape: how many units do it side by side, of each level, outermost first.
        seconds: of one mini-batch on one worker.
    """

    layers: tuple[int, ...]
    shape: tuple[int, ...]
    seconds: float

    @property
    def replicas(self) -> int:
        """How many workers do it side by side."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Partition:
    """Stages, and how long a mini-batch takes when the pipeline is full.

    Attributes:
        stages: in order.
        seconds: of the slowest stage or transfer.
        single: seconds on one worker.
        side_by_side: seconds by data parallelism alone, with no bound on memory.
    """

    stages: tuple[Stage, ...]
    seconds: float
    single: float
    side_by_side: float

    @property
    def replicas(self) -> str:
        """As plans have it: `15-1`."""
        return "-".join(str(stage.replicas) for stage in self.stages)

    @property
    def in_flight(self) -> int:
        """Mini-batches that keep the pipeline full, for each replica of the first stage."""
        workers = sum(stage.replicas for stage in self.stages)
        return math.ceil(workers / self.stages[0].replicas)


def partition(
    graph: LayerGraph,
    levels: Sequence[Level],
    *,
    straight: bool = False,
    memory: Memory | None = None,
    states: Sequence[State] | None = None,
) -> Partition:
    """The partition of a model whose slowest stage or transfer is fastest, on all workers.

    Args:
        graph: the model's layers.
        levels: of the machine, innermost first.
        straight: no stage has more than one unit.
        memory: what a worker may hold; None is no bound.
        states: where the model may be cut; by itself, along all antichains.

    Raises:
        PlanError: there are fewer places to cut at than the stages need, no partition fits the
            memory, or a level or the memory makes no sense.
    """
    _check(levels, memory)
    states = antichains(graph) if states is None else states
    found = solve(states, levels, lambda s: _Paper(s, levels), straight=straight, memory=memory)
    return solved(found, states, levels, memory)


@dataclass(frozen=True, slots=True)
class _Paper:
    states: Sequence[State]
    levels: Sequence[Level]

    def stage(self, level: int, inner: float, weights: float, units: int, *, alone: bool) -> float:
        del alone
        reduced = 2 * (units - 1) / units * weights / self.levels[level].bandwidth
        return max(inner, reduced) / units

    def sent(self, level: int, split: int, last: int, units: int) -> float:
        del last, units
        return 2 * self.states[split].output / self.levels[level].bandwidth


def solved(
    recurrence: Recurrence,
    states: Sequence[State],
    levels: Sequence[Level],
    memory: Memory | None = None,
) -> Partition:
    """What a recurrence finds, as a partition.

    Raises:
        PlanError: it finds none.
    """
    seconds = recurrence.seconds
    if not math.isfinite(seconds):
        raise _none(len(states) - 1, math.prod(level.units for level in levels), memory)
    stages = []
    for span in recurrence.spans():
        begin, end = states[span.first], states[span.last]
        layers = tuple(members(end.mask & ~begin.mask))
        stages.append(Stage(layers, span.shape, end.seconds - begin.seconds))
    return Partition(tuple(stages), seconds, states[-1].seconds, recurrence.side_by_side())


def _check(levels: Sequence[Level], memory: Memory | None) -> None:
    if not levels:
        raise PlanError("the machine has no levels; give one, with its units and bandwidth")
    for level in levels:
        if level.units < 1 or not level.bandwidth > 0:
            raise PlanError(
                f"a level of the machine has {level.units} units at {level.bandwidth} bytes/s; it "
                "needs one unit or more and a bandwidth above 0"
            )
    if memory is None:
        return
    for what, count in (("versions", memory.versions), ("microbatches", memory.microbatches)):
        if count is not None and count < 1:
            raise PlanError(
                f"the memory counts {what}={count}; a worker holds one at least: give 1 or more, "
                "or None for as many as the pipeline takes"
            )


def _none(places: int, workers: int, memory: Memory | None) -> PlanError:
    if memory is None:
        return PlanError(
            f"a straight pipeline on {workers} workers needs {workers} stages, but the model can "
            f"be cut into {places} at most; use fewer workers, or let stages be replicated"
        )
    return PlanError(
        f"no partition over {workers} workers holds its weights and activations in "
        f"{memory.capacity:g} bytes a worker; allow more, use more workers, make mini-batches "
        "smaller, or keep fewer versions of weights"
    )
