"""The best schedule for given times and a memory cap: exact when small, near the best when large.

Candidates are the named schedules that the placement and the cap allow, and what list scheduling
makes under many policies. If none of them meets the lower bound and the step is small, branch and
bound goes on until the best is proved or its effort is spent. Nothing depends on a clock, so the
same question has the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.bound import bound
from meshwright.schedule.dualpipe_v import dualpipe_v
from meshwright.schedule.exact import improve
from meshwright.schedule.gpipe import gpipe
from meshwright.schedule.greedy import greedy, policies
from meshwright.schedule.interleaved import interleaved
from meshwright.schedule.one_f_one_b import one_f_one_b
from meshwright.schedule.placement import folded, looped
from meshwright.schedule.problem import Memory, Problem, fits, room
from meshwright.schedule.simulate import Seconds, account, timeline, uniform
from meshwright.schedule.zero_bubble import zb_h1, zb_h2, zb_v

__all__ = ["Found", "peaks", "search", "search_named"]

_PLACED = 20
"""Actions that list scheduling may place for every node of the effort."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        schedule: the best one, named `search`.
        makespan: how long its step takes.
        bound: no schedule takes less; equal to `makespan` if the schedule is proved to be best.
    """

    schedule: Schedule
    makespan: float
    bound: float

    @property
    def gap(self) -> float:
        """How much longer than the bound the schedule takes, as a share of it."""
        return self.makespan / self.bound - 1 if self.bound else 0.0


def search(
    placement: tuple[int, ...],
    microbatches: int,
    seconds: Seconds,
    memory: Memory | None = None,
    effort: int = 20_000,
) -> Found:
    """The best legal schedule found.

    Args:
        placement: of each stage, its rank.
        microbatches: of a step.
        seconds: of each stage's actions. Whole backwards are tried only where `backward` is given.
        memory: what ranks may hold; None is no bound.
        effort: nodes that branch and bound may look at; list scheduling tries in proportion.

    Raises:
        PlanError: no schedule can meet the cap; the message says the least that one can.
    """
    problem = Problem(placement, microbatches, seconds, memory)
    fits(problem)
    least = bound(problem)
    best = _listed(problem, least, _PLACED * effort)
    for candidate in _named(problem):
        if not _met(best[0], least) and _is_within(problem, candidate):
            for merged in _mergers(problem):
                best = _better(problem, best, _merged(candidate, merged))
    if not _met(best[0], least):
        found, least = improve(problem, best[0], least, effort)
        best = best if found is None else _better(problem, best, found)
    return Found(best[1], best[0], min(least, best[0]))


def search_named(ranks: int, microbatches: int, virtual: int) -> Schedule:
    """What `schedule=search` means before anything is measured: equal times, 1F1B's memory."""
    placement = looped(ranks, virtual)
    memory = Memory((float(len(placement)),) * ranks, (1.0,) * len(placement))
    return search(placement, microbatches, uniform(len(placement)), memory, effort=2_000).schedule


def _met(makespan: float, least: float) -> bool:
    return makespan <= least * (1 + 1e-9)


_Best = tuple[float, Schedule]


def _better(problem: Problem, best: _Best | None, candidate: Schedule) -> _Best:
    named = replace(candidate, name="search")
    makespan = account(timeline(named, problem.seconds)).makespan
    return (makespan, named) if best is None or makespan < best[0] else best


def _listed(problem: Problem, least: float, trials: int) -> _Best:
    """The best of list scheduling; the first policy is always tried."""
    actions = 3 * len(problem.placement) * problem.microbatches
    stages = len(problem.placement)
    mergers = _mergers(problem)
    best: _Best | None = None
    # Orders made for equal times are regular, and often the better ones when the cap is tight.
    even = replace(problem, seconds=uniform(stages))
    tries = ((policy, each) for policy in policies(problem) for each in (problem, even))
    for index, (policy, each) in enumerate(tries):
        if best is not None and (index * actions > trials or _met(best[0], least)):
            break
        # Where parts may be merged, a longer schedule can become the shorter one.
        cut = best is not None and each is problem and len(mergers) == 1
        made = greedy(each, policy, best[0] if best and cut else math.inf)
        if made is not None:
            for merged in mergers:
                best = _better(problem, best, _merged(made, merged))
    assert best is not None
    return best


def _named(problem: Problem) -> Iterator[Schedule]:
    ranks, count = problem.ranks, problem.microbatches
    if problem.placement == looped(ranks):
        yield from (zb_h1(ranks, count), zb_h2(ranks, count))
        if problem.seconds.backward:
            yield one_f_one_b(ranks, count)
    elif problem.placement == folded(ranks):
        yield zb_v(ranks, count)
        if problem.seconds.backward:
            yield dualpipe_v(ranks, count)
    elif problem.seconds.backward:
        virtual = len(problem.placement) // ranks
        if problem.placement == looped(ranks, virtual):
            yield from (interleaved(ranks, count, virtual), gpipe(ranks, count, virtual))


def _mergers(problem: Problem) -> tuple[range, ...]:
    """Stages whose backwards are put together again where their parts follow each other."""
    every = range(len(problem.placement))
    return (range(0), range(1), every) if problem.seconds.backward else (range(0),)


def _merged(schedule: Schedule, stages: range) -> Schedule:
    """The schedule with parts put together on these stages."""
    orders = (tuple(_merge(order, stages)) for order in schedule.ranks)
    return replace(schedule, ranks=tuple(orders))


def _merge(order: tuple[Action, ...], stages: range) -> Iterator[Action]:
    index = 0
    while index < len(order):
        action = order[index]
        weights = replace(action, kind="W")
        if action.kind == "I" and action.stage in stages and order[index + 1] == weights:
            yield replace(action, kind="B")
            index += 1
        else:
            yield action
        index += 1


def _is_within(problem: Problem, schedule: Schedule) -> bool:
    """Whether no rank ever holds more than it may."""
    return all(room(peak, problem.cap(rank)) for rank, peak in enumerate(peaks(problem, schedule)))


def peaks(problem: Problem, schedule: Schedule) -> tuple[float, ...]:
    """Of each rank, the most that it holds, in the unit of the problem's memory."""
    return tuple(max(accumulate(_deltas(problem, order), initial=0.0)) for order in schedule.ranks)


def _deltas(problem: Problem, order: tuple[Action, ...]) -> Iterator[float]:
    for action in order:
        held, owed = problem.held(action.stage), problem.owed(action.stage)
        yield {"F": held, "I": owed - held, "W": -owed, "B": -held}[action.kind]
