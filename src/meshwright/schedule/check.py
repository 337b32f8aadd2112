"""Proves that a schedule is whole, can run, and what it holds in memory.

**Whole.** Every stage takes every micro-batch forward once and back once: by one `B`, or by one `I`
and one `W`. A schedule without any backward is one for inference.

**Can run.** Ranks take their actions in order, and an action begins when all that it reads is
there. Between two ranks, messages of a direction are sent and received in one order, that of the
sender's actions, and sends have no buffer: a send ends when the receiver has posted its receive,
and its rank stands still until then. Receives are posted ahead of the actions that read them: all
from the outset, or no more than `ahead` for each direction that have not been read yet. Running
that partial order to its end is the proof; a rank that cannot go on belongs to a cycle, and the
error names it. With all receives posted, a send never waits, so what is left is that no rank's
order contradicts what the stages read from each other; `least_ahead` says how few will do.

**Holds.** A micro-batch is alive on a stage from its `F` until its `B`, or its `W` where split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Kind, Schedule
from meshwright.schedule.graph import Graph, Stuck, graph_of, walk
from meshwright.schedule.rendezvous import least_window, meet

__all__ = ["Facts", "check", "least_ahead"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a legal schedule holds, in units of one stage and one micro-batch.

    Attributes:
        peaks: of each rank, most forwards alive at once: from `F` until `B`, or `W` where split.
        peaks_to_input: the same until `B` or `I`: what is held of a stage whose `I` already frees
            what its `W` does not read.
        peaks_owed: of each rank, most weight parts outstanding: from `I` until `W`.
    """

    peaks: tuple[int, ...]
    peaks_to_input: tuple[int, ...]
    peaks_owed: tuple[int, ...]


def check(schedule: Schedule, ahead: int | None = None) -> Facts:
    """What the schedule holds, if it is legal.

    Args:
        schedule: any, of whatever source.
        ahead: receives that a rank posts ahead of their reading, for each rank that sends to it;
            None posts all from the outset.

    Raises:
        PlanError: an action is missing, doubled, foreign or on the wrong rank, or ranks wait for
            each other in a ring.
    """
    _is_whole(schedule)
    graph = graph_of(schedule)
    ended = walk(graph) if ahead is None else meet(graph, ahead)
    if isinstance(ended, Stuck):
        raise PlanError(f"schedule {schedule.name} deadlocks: {_ring(graph, ended)}")
    ends: tuple[tuple[str, str], ...] = (("F", "BW"), ("F", "BI"), ("I", "W"))
    return Facts(*(tuple(_peak(order, *end) for order in schedule.ranks) for end in ends))


def least_ahead(schedule: Schedule) -> int:
    """The fewest receives posted ahead, for each direction, with which unbuffered sends run."""
    _is_whole(schedule)
    graph = graph_of(schedule)
    if isinstance(stuck := walk(graph), Stuck):
        raise PlanError(f"schedule {schedule.name} deadlocks: {_ring(graph, stuck)}")
    return least_window(graph)


def _is_whole(schedule: Schedule) -> None:
    found = None if _adds_up(schedule) else next(_faults(schedule), None)
    if found is not None:
        raise PlanError(f"schedule {schedule.name} is not whole: {found}")


def _adds_up(schedule: Schedule) -> bool:
    """Whether all is there once, found quickly; `_faults` says what is not."""
    stages = range(schedule.stages)
    taken: dict[tuple[int, Kind], list[int]] = {}
    for rank, order in enumerate(schedule.ranks):
        for action in order:
            taken.setdefault((action.stage, action.kind), []).append(action.microbatch)
        if any(schedule.placement[s] != rank for s in {a.stage for a in order} if s in stages):
            return False
    every = list(range(schedule.microbatches))
    trains = any(kind != "F" for _, kind in taken)
    for stage in stages:
        forward, whole, inputs, weights = (sorted(taken.pop((stage, k), ())) for k in _KINDS)
        if forward != every or inputs != weights:
            return False
        if trains and sorted((*whole, *inputs)) != every:
            return False
    return not taken


_KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


def _faults(schedule: Schedule) -> Iterator[str]:
    yield from _foreign(schedule)
    seen = Counter(action for order in schedule.ranks for action in order)
    yield from (f"{action} comes {n} times, not once" for action, n in seen.items() if n > 1)
    trains = any(action.kind != "F" for action in seen)
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            if Action(stage, "F", microbatch) not in seen:
                yield _lacks(schedule, Action(stage, "F", microbatch))
            if trains:
                yield from _unbacked(schedule, seen, stage, microbatch)


def _foreign(schedule: Schedule) -> Iterator[str]:
    """Actions that are not this pipeline's, or not this rank's."""
    stages, count = schedule.stages, schedule.microbatches
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < len(schedule.ranks):
            yield f"stage {stage} is on rank {rank}, but there are {len(schedule.ranks)} ranks"
    for rank, order in enumerate(schedule.ranks):
        for action in order:
            if not 0 <= action.stage < stages:
                yield f"rank {rank} has {action}, but there are {stages} stages, counted from 0"
            elif not 0 <= action.microbatch < count:
                yield f"rank {rank} has {action}, but there are {count} micro-batches, from 0"
            elif schedule.placement[action.stage] != rank:
                home = schedule.placement[action.stage]
                yield f"rank {rank} has {action}, but stage {action.stage} is on rank {home}"


def _unbacked(
    schedule: Schedule, seen: Counter[Action], stage: int, microbatch: int
) -> Iterator[str]:
    whole, inputs, weights = (Action(stage, kind, microbatch) for kind in _BACKWARDS)
    if whole in seen:
        other = next((part for part in (inputs, weights) if part in seen), None)
        if other is not None:
            yield f"{whole} is the whole backward, and {other} is there too; take B, or I and W"
    elif inputs not in seen and weights not in seen:
        yield _lacks(schedule, whole)
    elif inputs not in seen:
        yield _lacks(schedule, inputs)
    elif weights not in seen:
        yield _lacks(schedule, weights)


_BACKWARDS: tuple[Kind, ...] = ("B", "I", "W")


def _lacks(schedule: Schedule, action: Action) -> str:
    return f"rank {schedule.placement[action.stage]} lacks {action}"


def _ring(graph: Graph, stuck: Stuck) -> str:
    """The ranks that wait for each other, from any that is stuck along what it waits for."""
    path: list[int] = []
    rank = min(stuck.waits)
    while rank not in path:
        path.append(rank)
        rank = graph.home[stuck.waits[rank][1]]
    return "; ".join(_wait(graph, stuck, rank) for rank in sorted(path[path.index(rank) :]))


def _wait(graph: Graph, stuck: Stuck, rank: int) -> str:
    number, need = stuck.waits[rank]
    at, wanted = graph.actions[number], graph.actions[need]
    if graph.home[need] == rank:
        return f"rank {rank} waits at {at} for {wanted}, which comes later on the same rank"
    if graph.feeds[number] == need:
        return f"rank {rank} waits at {at} for rank {graph.home[need]} to take it for {wanted}"
    return f"rank {rank} waits at {at} for {wanted}"


def _peak(order: Iterable[Action], begins: str, ends: str) -> int:
    alive = peak = 0
    for action in order:
        if action.kind in begins:
            alive += 1
            peak = max(peak, alive)
        elif action.kind in ends:
            alive -= 1
    return peak
