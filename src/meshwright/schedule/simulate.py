"""When each action of a schedule begins and ends, given how long everything takes.

    F = I = W = 1, ZB-H1:

    rank 0  0F0 0F1   . 0I0 0W0 0I1 0W1
    rank 1    . 1F0 1I0 1F1 1I1 1W0 1W1

An action begins when its rank is free and what it reads has come. A transfer takes its time beside
the computing, and transfers do not slow each other down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.check import check
from meshwright.schedule.graph import Graph, Stuck, graph_of, walk

__all__ = ["Account", "Seconds", "Span", "account", "fit", "timeline", "uniform"]


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long each stage takes for one micro-batch.

    Attributes:
        forward: of each stage.
        inputs: the backward's part for the inputs.
        weights: the backward's part for the weights.
        transfer: between each stage and the next, either way, when they are on different ranks.
        backward: the whole backward; by itself both parts after another.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    transfer: tuple[float, ...]
    backward: tuple[float, ...] = ()

    def of(self, action: Action) -> float:
        """How long the action takes."""
        stage = action.stage
        match action.kind:
            case "F":
                return self.forward[stage]
            case "I":
                return self.inputs[stage]
            case "W":
                return self.weights[stage]
        return self.backward[stage] if self.backward else self.inputs[stage] + self.weights[stage]


def uniform(
    stages: int,
    forward: float = 1.0,
    inputs: float = 1.0,
    weights: float = 1.0,
    transfer: float = 0.0,
) -> Seconds:
    """All stages alike."""
    return Seconds(
        (forward,) * stages, (inputs,) * stages, (weights,) * stages, (transfer,) * (stages - 1)
    )


def fit(seconds: Seconds, stages: int) -> None:
    """Refuse times of other stages than there are.

    Raises:
        PlanError: there are too many or too few, or one is below 0 or no number.
    """
    given = {
        "forward": (seconds.forward, stages),
        "inputs": (seconds.inputs, stages),
        "weights": (seconds.weights, stages),
        "transfer": (seconds.transfer, stages - 1),
        "backward": (seconds.backward, stages if seconds.backward else 0),
    }
    for what, (found, wanted) in given.items():
        if len(found) != wanted:
            raise PlanError(f"{len(found)} times for {what}, but {wanted} for {stages} stages")
        for place, value in enumerate(found):
            if not 0 <= value < math.inf:
                raise PlanError(f"{what} of stage {place} takes {value}; it must be 0 or more")


class Span(NamedTuple):
    """An action on a rank, and when."""

    rank: int
    action: Action
    begin: float
    end: float


def timeline(schedule: Schedule, seconds: Seconds) -> tuple[Span, ...]:
    """Every action with its time, rank by rank, in order.

    Raises:
        PlanError: the schedule is not legal, or times are given for other stages than it has.
    """
    check(schedule)
    fit(seconds, schedule.stages)
    graph = graph_of(schedule)
    return tuple(
        Span(graph.home[number], action, begin, end)
        for number, (action, (begin, end)) in enumerate(
            zip(graph.actions, _times(graph, seconds), strict=True)
        )
    )


def _times(graph: Graph, seconds: Seconds) -> list[tuple[float, float]]:
    order = walk(graph)
    assert not isinstance(order, Stuck)
    free = [0.0] * len(graph.ranks)
    times = [(0.0, 0.0)] * len(graph.actions)
    for number in order:
        action, rank = graph.actions[number], graph.home[number]
        begin = free[rank]
        for need in graph.needs[number]:
            come = times[need][1]
            if graph.home[need] != rank:
                come += seconds.transfer[min(action.stage, graph.actions[need].stage)]
            begin = max(begin, come)
        free[rank] = begin + seconds.of(action)
        times[number] = (begin, free[rank])
    return times


@dataclass(frozen=True, slots=True)
class Account:
    """Where the time of a step goes.

    Attributes:
        makespan: until the last rank is done.
        busy: of each rank, time computing.
        idle: of each rank, the rest of the makespan.
        spans: of each rank, from its first action to the end of its last.
        bubble: most time that a rank stands idle within its span. When a step's ranks may start as
            staggered as the last one's ended, this is what the pipeline costs (Qi 2023).
        fraction: idle share of all ranks' makespans.
    """

    makespan: float
    busy: tuple[float, ...]
    idle: tuple[float, ...]
    spans: tuple[float, ...]
    bubble: float
    fraction: float


def account(spans: Sequence[Span]) -> Account:
    """Add up a timeline."""
    ranks: list[list[Span]] = [[] for _ in range(1 + max(span.rank for span in spans))]
    for span in spans:
        ranks[span.rank].append(span)
    makespan = max(span.end for span in spans)
    busy = tuple(sum(span.end - span.begin for span in each) for each in ranks)
    lasts = tuple(each[-1].end - each[0].begin if each else 0.0 for each in ranks)
    return Account(
        makespan,
        busy,
        tuple(makespan - each for each in busy),
        lasts,
        max(last - each for last, each in zip(lasts, busy, strict=True)),
        1 - sum(busy) / (makespan * len(ranks)) if makespan else 0.0,
    )
