"""Branch and bound over the orders of a small step: what it ends with is proved to be best.

At every node, of all actions that could come next, take the one that would end first. Some best
schedule goes on, on that action's rank, with an action that can begin before that end (Giffler and
Thompson 1960): any later one would leave room for it. Where the action takes memory this does not
follow, since memory may be wanted for another; so there is one more branch that holds it back until
its rank has done something else. Nodes are cut that cannot beat the best schedule so far, or that
are nowhere earlier than a node that has done the same. Micro-batches of a stage are alike, so they
are taken in order; no part of a backward is taken to be longer than the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from meshwright.schedule.action import Action, Kind, Schedule
from meshwright.schedule.problem import Problem, room

__all__ = ["improve"]

_MOST_ACTIONS = 200
_KEPT = 12
"""Nodes remembered of those that have done the same."""

_Step = tuple[Kind, int]


@dataclass(frozen=True, slots=True)
class _Option:
    """An action that could come next."""

    end: float
    begin: float
    rank: int
    kind: Kind
    stage: int


def improve(
    problem: Problem, best: float, least: float, effort: int
) -> tuple[Schedule | None, float]:
    """A schedule shorter than `best`, if there is one, and a bound; the two meet when proved."""
    if 3 * len(problem.placement) * problem.microbatches > _MOST_ACTIONS:
        return None, least
    tree = _Tree(problem, best, least, effort)
    tree.grow()
    proved = tree.best if tree.effort > 0 else least
    return (None if tree.found is None else _schedule(problem, tree.found)), proved


class _Tree:
    """The node that is looked at, changed in place on the way down and put back on the way up."""

    def __init__(self, problem: Problem, best: float, least: float, effort: int) -> None:
        stages, ranks = len(problem.placement), problem.ranks
        self.problem, self.best, self.least, self.effort = problem, best, least, effort
        self.found: list[list[_Step]] | None = None
        self.mine = [problem.stages_of(rank) for rank in range(ranks)]
        self.orders: list[list[_Step]] = [[] for _ in range(ranks)]
        self.free, self.live = [0.0] * ranks, [0.0] * ranks
        self.forwards, self.backwards = [0] * stages, [0] * stages
        self.owed = [0] * stages
        self.forward_at: list[list[float]] = [[] for _ in range(stages)]
        self.forward_at[0] = [0.0] * problem.microbatches
        self.backward_at: list[list[float]] = [[] for _ in range(stages)]
        self.held_back: frozenset[_Step] = frozenset()
        self.seen: dict[object, list[tuple[float, ...]]] = {}
        hops = [problem.hop(stage) for stage in range(stages - 1)]
        inputs = [problem.to_inputs(stage) for stage in range(stages)]
        self.tails = list(
            accumulate((i + h for i, h in zip(inputs, hops, strict=False)), initial=0.0)
        )
        self.inputs, self.hops = inputs, [*hops, 0.0]
        self.last = problem.back(0) - inputs[0]

    def grow(self) -> None:
        """Look at everything below this node."""
        self.effort -= 1
        if self.effort <= 0 or self.best <= self.least * (1 + 1e-12):
            return
        options = list(self._options())
        if not options:
            self._leaf()
            return
        if self._bound() >= self.best * (1 - 1e-12) or self._is_dominated():
            return
        first = min(options, key=lambda option: (option.end, option.rank, option.stage))
        rivals = [o for o in options if o.rank == first.rank and o.begin < first.end]
        for option in sorted({first, *rivals}, key=_promise):
            self._down(option)
        if self._takes_memory(first):
            before = self.held_back
            self.held_back |= {(first.kind, first.stage)}
            self.grow()
            self.held_back = before

    def _leaf(self) -> None:
        if all(done == self.problem.microbatches for done in self.backwards) and not any(self.owed):
            end = max(self.free)
            if end < self.best * (1 - 1e-12):
                self.best, self.found = end, [list(order) for order in self.orders]

    # ── what could come next ─────────────────────────────────────────────────────────────────────

    def _options(self) -> Iterator[_Option]:
        for rank, mine in enumerate(self.mine):
            for stage in mine:
                for kind, ready in self._ready(stage):
                    if (kind, stage) not in self.held_back and self._fits(rank, kind, stage):
                        begin = max(self.free[rank], ready)
                        end = begin + self.problem.seconds.of(Action(stage, kind, 0))
                        yield _Option(end, begin, rank, kind, stage)

    def _ready(self, stage: int) -> Iterator[tuple[Kind, float]]:
        if self.forwards[stage] < len(self.forward_at[stage]):
            yield "F", self.forward_at[stage][self.forwards[stage]]
        if self.backwards[stage] < len(self.backward_at[stage]):
            come = self.backward_at[stage][self.backwards[stage]]
            yield "I", come
            if self.problem.seconds.backward:
                yield "B", come
        if self.owed[stage]:
            yield "W", 0.0

    def _delta(self, kind: Kind, stage: int) -> float:
        held, owed = self.problem.held(stage), self.problem.owed(stage)
        return {"F": held, "B": -held, "I": owed - held, "W": -owed}[kind]

    def _fits(self, rank: int, kind: Kind, stage: int) -> bool:
        more = self._delta(kind, stage)
        return more <= 0 or room(self.live[rank] + more, self.problem.cap(rank))

    def _takes_memory(self, option: _Option) -> bool:
        if self.problem.memory is None:
            return False
        if option.kind == "B":  # its parts may be wanted instead, and not fit yet
            return self._delta("I", option.stage) > 0
        return self._delta(option.kind, option.stage) > 0

    # ── down and up ──────────────────────────────────────────────────────────────────────────────

    def _down(self, option: _Option) -> None:
        rank, kind, stage = option.rank, option.kind, option.stage
        free, live, held_back = self.free[rank], self.live[rank], self.held_back
        self.held_back = frozenset(s for s in held_back if s[1] not in self.mine[rank])
        self.free[rank] = option.end
        self.live[rank] += self._delta(kind, stage)
        self.orders[rank].append((kind, stage))
        to = self._count(kind, stage, 1)
        if to is not None:
            to[0].append(option.end + to[1])
        self.grow()
        if to is not None:
            to[0].pop()
        self._count(kind, stage, -1)
        self.orders[rank].pop()
        self.free[rank], self.live[rank], self.held_back = free, live, held_back

    def _count(self, kind: Kind, stage: int, by: int) -> tuple[list[float], float] | None:
        """Count the action; where its result goes, and how long that takes."""
        if kind == "W":
            self.owed[stage] -= by
            return None
        if kind == "F":
            self.forwards[stage] += by
            if stage + 1 == len(self.forwards):
                return self.backward_at[stage], 0.0
            return self.forward_at[stage + 1], self.hops[stage]
        self.backwards[stage] += by
        if kind == "I":
            self.owed[stage] += by
        return (self.backward_at[stage - 1], self.hops[stage - 1]) if stage else None

    # ── cutting ──────────────────────────────────────────────────────────────────────────────────

    def _is_dominated(self) -> bool:
        key = (tuple(self.forwards), tuple(self.backwards), tuple(self.owed), self.held_back)
        times = tuple(self._times())
        kept = self.seen.setdefault(key, [])
        if any(all(a <= b for a, b in zip(old, times, strict=True)) for old in kept):
            return True
        if len(kept) < _KEPT:
            kept.append(times)
        return False

    def _times(self) -> Iterator[float]:
        yield from self.free
        for stage, rank in enumerate(self.problem.placement):
            free = self.free[rank]
            for come in self.forward_at[stage][self.forwards[stage] :]:
                yield max(come, free)
            for come in self.backward_at[stage][self.backwards[stage] :]:
                yield max(come, free)

    def _bound(self) -> float:
        """No schedule below this node takes less."""
        problem, count = self.problem, self.problem.microbatches
        forward, backward = self._begins()
        found = max(self.free)
        for rank, mine in enumerate(self.mine):
            work, begin = 0.0, float("inf")
            for stage in mine:
                one = problem.seconds.forward[stage]
                ahead = (count - self.forwards[stage]) * one
                behind = count - self.backwards[stage]
                work += ahead + behind * problem.back(stage)
                work += self.owed[stage] * problem.seconds.weights[stage]
                begin = min(begin, forward[stage], backward[stage])
                if self.owed[stage]:
                    begin = self.free[rank]
                if behind:
                    both = min(forward[stage], backward[stage]) + ahead
                    start = max(backward[stage], both)
                    end = start + behind * self.inputs[stage]
                    found = max(found, end + self.tails[stage] + self.last)
            if work:
                found = max(found, begin + work)
        return found

    def _begins(self) -> tuple[list[float], list[float]]:
        """Of each stage, when its next forward and its next backward can begin at best."""
        none = float("inf")
        stages, count = len(self.forwards), self.problem.microbatches
        free = [self.free[rank] for rank in self.problem.placement]
        ones = self.problem.seconds.forward
        forward, backward = [none] * stages, [none] * stages
        for stage, done in enumerate(self.forwards):
            if done < len(self.forward_at[stage]):
                forward[stage] = max(free[stage], self.forward_at[stage][done])
            elif done < count:
                come = forward[stage - 1] + ones[stage - 1] + self.hops[stage - 1]
                forward[stage] = max(free[stage], come)
        for stage in reversed(range(stages)):
            done = self.backwards[stage]
            if done < len(self.backward_at[stage]):
                backward[stage] = max(free[stage], self.backward_at[stage][done])
            elif done < count and stage + 1 == stages:
                backward[stage] = forward[stage] + ones[stage]
            elif done < count:
                come = backward[stage + 1] + self.inputs[stage + 1] + self.hops[stage]
                backward[stage] = max(free[stage], come)
        return forward, backward


def _promise(option: _Option) -> tuple[int, float, int]:
    return ("IBFW".index(option.kind), option.begin, -option.stage)


def _schedule(problem: Problem, orders: list[list[_Step]]) -> Schedule:
    """Micro-batches put to the steps: each stage takes them in order."""
    ranks = tuple(tuple(_numbered(order)) for order in orders)
    return Schedule("search", problem.placement, problem.microbatches, ranks)


def _numbered(order: list[_Step]) -> Iterator[Action]:
    counts: dict[_Step, int] = {}
    owed: dict[int, deque[int]] = {}
    for kind, stage in order:
        if kind == "W":
            yield Action(stage, "W", owed[stage].popleft())
            continue
        lane: _Step = ("F" if kind == "F" else "B", stage)
        number = counts.get(lane, 0)
        counts[lane] = number + 1
        if kind == "I":
            owed.setdefault(stage, deque()).append(number)
        yield Action(stage, kind, number)
