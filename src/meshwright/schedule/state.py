"""How far a step has come, action by action: what is walked by the searches that look ahead.

Micro-batches of a stage are alike, so they are taken in order, and counts say it all:

    forwards (3, 2)   backwards (1, 1)   owed (0, 1)    stage 1 has an I done whose W is to come
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from meshwright.schedule.action import Action, Kind, Schedule
from meshwright.schedule.problem import Problem, room

__all__ = ["Option", "State", "Step"]

Step = tuple[Kind, int]
"""What is done on which stage; the micro-batch follows from those before."""


@dataclass(frozen=True, slots=True)
class Option:
    """An action that could come next."""

    end: float
    begin: float
    rank: int
    kind: Kind
    stage: int


class State:
    """The counts, when ranks are free, and when what has been sent arrives."""

    def __init__(self, problem: Problem) -> None:
        stages, ranks = len(problem.placement), problem.ranks
        self.problem = problem
        self.mine = [problem.stages_of(rank) for rank in range(ranks)]
        self.orders: list[list[Step]] = [[] for _ in range(ranks)]
        self.free, self.live = [0.0] * ranks, [0.0] * ranks
        self.forwards, self.backwards = [0] * stages, [0] * stages
        self.owed = [0] * stages
        self.forward_at: list[list[float]] = [[] for _ in range(stages)]
        self.forward_at[0] = [0.0] * problem.microbatches
        self.backward_at: list[list[float]] = [[] for _ in range(stages)]
        hops = [problem.hop(stage) for stage in range(stages - 1)]
        self.inputs = [problem.to_inputs(stage) for stage in range(stages)]
        self.hops = [*hops, 0.0]
        self.tails = list(
            accumulate((i + h for i, h in zip(self.inputs, hops, strict=False)), initial=0.0)
        )
        self.last = problem.back(0) - self.inputs[0]

    # ── what could come next ─────────────────────────────────────────────────────────────────────

    def options(self) -> Iterator[Option]:
        """All actions whose inputs have been sent and whose memory is there."""
        for rank, mine in enumerate(self.mine):
            for stage in mine:
                for kind, ready in self._ready(stage):
                    if self._fits(rank, kind, stage):
                        begin = max(self.free[rank], ready)
                        end = begin + self.problem.seconds.of(Action(stage, kind, 0))
                        yield Option(end, begin, rank, kind, stage)

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

    def delta(self, kind: Kind, stage: int) -> float:
        """Memory that the action takes for good."""
        held, owed = self.problem.held(stage), self.problem.owed(stage)
        return {"F": held, "B": -held, "I": owed - held, "W": -owed}[kind]

    def _fits(self, rank: int, kind: Kind, stage: int) -> bool:
        more = self.delta(kind, stage)
        return more <= 0 or room(self.live[rank] + more, self.problem.cap(rank))

    # ── on and back ──────────────────────────────────────────────────────────────────────────────

    def take(self, option: Option) -> tuple[float, float]:
        """Do the action; what `undo` needs."""
        rank = option.rank
        before = self.free[rank], self.live[rank]
        self.free[rank] = option.end
        self.live[rank] += self.delta(option.kind, option.stage)
        self.orders[rank].append((option.kind, option.stage))
        to = self._count(option.kind, option.stage, 1)
        if to is not None:
            to[0].append(option.end + to[1])
        return before

    def undo(self, option: Option, before: tuple[float, float]) -> None:
        """Take the action back; nothing else may have been done since."""
        to = self._count(option.kind, option.stage, -1)
        if to is not None:
            to[0].pop()
        self.orders[option.rank].pop()
        self.free[option.rank], self.live[option.rank] = before

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

    # ── what is still to come ────────────────────────────────────────────────────────────────────

    def times(self) -> Iterator[float]:
        """When everything that is under way is there."""
        yield from self.free
        for stage, rank in enumerate(self.problem.placement):
            free = self.free[rank]
            for come in self.forward_at[stage][self.forwards[stage] :]:
                yield max(come, free)
            for come in self.backward_at[stage][self.backwards[stage] :]:
                yield max(come, free)

    def bound(self) -> float:
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

    def is_done(self) -> bool:
        """Whether nothing is left."""
        count = self.problem.microbatches
        return all(done == count for done in self.backwards) and not any(self.owed)

    def schedule(self) -> Schedule:
        """What has been done, micro-batches put to the steps."""
        ranks = tuple(tuple(_numbered(order)) for order in self.orders)
        problem = self.problem
        return Schedule("search", problem.placement, problem.microbatches, ranks)


def _numbered(order: list[Step]) -> Iterator[Action]:
    counts: dict[Step, int] = {}
    owed: dict[int, deque[int]] = {}
    for kind, stage in order:
        if kind == "W":
            yield Action(stage, "W", owed[stage].popleft())
            continue
        lane: Step = ("F" if kind == "F" else "B", stage)
        number = counts.get(lane, 0)
        counts[lane] = number + 1
        if kind == "I":
            owed.setdefault(stage, deque()).append(number)
        yield Action(stage, kind, number)
