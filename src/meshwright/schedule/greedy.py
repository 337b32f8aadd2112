"""List scheduling: whenever a rank is free, it takes the best of what is ready, by some policy.

    rank free -> I if one is there, else F while memory lasts, else W     (much as ZB does)

A forward is taken only if the oldest micro-batch can still go all the way forward afterwards: every
rank keeps memory for its remaining stages there, so no rank can run full and stop.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from meshwright.schedule.action import Action, Kind, Schedule
from meshwright.schedule.bound import period
from meshwright.schedule.problem import Problem, room

__all__ = ["Policy", "greedy", "policies"]

Choice = tuple[Kind, int]

_SLACK = 1.1
"""A schedule may turn out so much shorter: its order is kept, its waits for memory are not."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a free rank chooses.

    Attributes:
        whole: backwards are not split.
        depth: most micro-batches in flight, as a multiple of what 1F1B has; 0 is memory alone.
        forward_first: forwards before backwards, else the reverse.
        patience: a rank waits for what is known to come within so many times its weight part.
        late_first: of several stages on a rank, the later one's work first.
        pace: micro-batches set out no faster than one in so many periods; 0 is as fast as can be.
        cautious: memory that will come back by itself is not counted on.
    """

    whole: bool = False
    depth: int = 1
    forward_first: bool = False
    patience: float = 0.0
    late_first: bool = True
    pace: float = 0.0
    cautious: bool = False


def policies(problem: Problem) -> Iterator[Policy]:
    """Every policy, the most promising first."""
    several = len(problem.placement) > problem.ranks
    for policy in product(
        (False, True) if problem.seconds.backward else (False,),
        (1, 2, 0),
        (False, True),
        (0.0, 0.5, 1.0),
        (True, False) if several else (True,),
        (0.0, 1.0) if problem.memory is None else (0.0, 1.0, 1.05, 1.1),
        (False, True) if several else (False,),
    ):
        found = Policy(*policy)
        if not (found.whole and found.patience):
            yield found


def greedy(problem: Problem, policy: Policy, best: float = math.inf) -> Schedule | None:
    """The schedule that the policy makes of the problem, unless it is far longer than `best`."""
    return _Run(problem, policy, best).schedule()


class _Run:
    """One simulation: events in the order of time, ranks that take or stay idle."""

    def __init__(self, problem: Problem, policy: Policy, best: float) -> None:
        stages, ranks = len(problem.placement), problem.ranks
        self.problem, self.policy, self.best = problem, policy, best
        self.mine = [problem.stages_of(rank) for rank in range(ranks)]
        if policy.late_first:
            self.mine = [stages_of[::-1] for stages_of in self.mine]
        self.orders: list[list[Action]] = [[] for _ in range(ranks)]
        self.left = [self._work(rank) for rank in range(ranks)]
        self.free = [0.0] * ranks
        self.live = [0.0] * ranks
        self.flying = [0] * ranks
        self.forwards, self.backwards = [0] * stages, [0] * stages
        self.forward_at: list[deque[float]] = [deque() for _ in range(stages)]
        self.backward_at: list[deque[float]] = [deque() for _ in range(stages)]
        self.owed: list[deque[tuple[int, int]]] = [deque() for _ in range(ranks)]
        self.limits = [self._limit(rank) for rank in range(ranks)]
        self.pace = policy.pace * period(problem)
        self.forward_at[0].append(0.0)
        self.events = [(0.0, problem.placement[0])]

    def schedule(self) -> Schedule | None:
        while self.events:
            now, rank = heapq.heappop(self.events)
            if now >= self.free[rank]:
                choice = self._choose(rank, now)
                if choice is not None:
                    self._take(rank, now, *choice)
                if now + self.left[rank] > _SLACK * self.best:
                    return None
        assert min(self.backwards) == self.problem.microbatches, "list scheduling ran full"
        orders = tuple(map(tuple, self.orders))
        return Schedule("search", self.problem.placement, self.problem.microbatches, orders)

    def _work(self, rank: int) -> float:
        seconds = self.problem.seconds
        parts = (seconds.forward, seconds.inputs, seconds.weights)
        each = sum(part[stage] for part in parts for stage in self.mine[rank])
        return self.problem.microbatches * each

    # ── choosing ─────────────────────────────────────────────────────────────────────────────────

    def _choose(self, rank: int, now: float) -> Choice | None:
        if self.policy.forward_first:
            choice = self._forward(rank, now) or self._backward(rank, now)
        else:
            choice = self._backward(rank, now) or self._forward(rank, now)
        if choice is not None or not self.owed[rank]:
            return choice
        stage = self.owed[rank][0][0]
        wait = now + self.policy.patience * self.problem.seconds.weights[stage]
        soon = wait > now and (self._backward(rank, wait) or self._forward(rank, wait))
        return None if soon else ("W", stage)

    def _forward(self, rank: int, now: float) -> Choice | None:
        for stage in self.mine[rank]:
            ready = self.forward_at[stage]
            if ready and ready[0] <= now and self._has_room(rank, stage):
                return "F", stage
        return None

    def _backward(self, rank: int, now: float) -> Choice | None:
        for stage in self.mine[rank]:
            ready = self.backward_at[stage]
            if ready and ready[0] <= now:
                if self.policy.whole:
                    return "B", stage
                more = self.problem.owed(stage) - self.problem.held(stage)
                if room(self.live[rank] + more, self.problem.cap(rank)):
                    return "I", stage
        return None

    def _has_room(self, rank: int, stage: int) -> bool:
        """Whether, after this forward, the oldest micro-batch can still go through here."""
        mine, done = self.mine[rank], self.forwards
        oldest = min(done[each] for each in mine)
        rest = [each for each in mine if done[each] == oldest]
        if done[stage] == oldest:
            rest.remove(stage)
        # What has been all the way forward only gives memory back: it stands in nobody's way.
        there = 0 if self.policy.cautious else done[-1]
        standing = sum(done[each] - there for each in mine) if there else self.flying[rank]
        if max(self.flying[rank], standing + len(rest)) >= self.limits[rank]:
            return False
        problem = self.problem
        if problem.memory is None:
            return True
        held, cap = problem.held, problem.cap(rank)
        swell = max(0.0, *(problem.owed(each) - held(each) for each in mine))
        kept = sum(held(each) * (done[each] - there) for each in mine) if there else self.live[rank]
        return room(max(self.live[rank], kept + sum(map(held, rest))) + held(stage) + swell, cap)

    def _limit(self, rank: int) -> int:
        depth, ranks = self.policy.depth, self.problem.ranks
        chunks = len(self.mine[rank])
        if depth == 0:
            return chunks * self.problem.microbatches
        return depth * (ranks - rank) if chunks == 1 else depth * chunks * ranks

    # ── taking ───────────────────────────────────────────────────────────────────────────────────

    def _take(self, rank: int, now: float, kind: Kind, stage: int) -> None:
        action = self._next(rank, now, kind, stage)
        self.orders[rank].append(action)
        end = self.free[rank] = now + self.problem.seconds.of(action)
        self.left[rank] -= end - now
        heapq.heappush(self.events, (end, rank))
        held, owed = self.problem.held(stage), self.problem.owed(stage)
        self.live[rank] += {"F": held, "B": -held, "I": owed - held, "W": -owed}[kind]
        if kind == "F":
            self._sent_forward(stage, end)
        elif kind != "W" and stage:
            self._send(
                self.backward_at[stage - 1], end, stage - 1, self.problem.placement[stage - 1]
            )

    def _next(self, rank: int, now: float, kind: Kind, stage: int) -> Action:
        """The stage's next action of the kind, counted."""
        if kind == "W":
            return Action(stage, "W", self.owed[rank].popleft()[1])
        if kind == "F":
            self.forward_at[stage].popleft()
            self.flying[rank] += 1
            self.forwards[stage] += 1
            if not stage and self.forwards[0] < self.problem.microbatches:
                self.forward_at[0].append(now + self.pace)
                heapq.heappush(self.events, (now + self.pace, rank))
            return Action(stage, "F", self.forwards[stage] - 1)
        self.backward_at[stage].popleft()
        self.flying[rank] -= 1
        self.backwards[stage] += 1
        number = self.backwards[stage] - 1
        if kind == "I":
            self.owed[rank].append((stage, number))
        return Action(stage, kind, number)

    def _sent_forward(self, stage: int, end: float) -> None:
        if stage + 1 == len(self.problem.placement):
            self.backward_at[stage].append(end)
        else:
            self._send(self.forward_at[stage + 1], end, stage, self.problem.placement[stage + 1])

    def _send(self, to: deque[float], end: float, edge: int, rank: int) -> None:
        come = end + self.problem.hop(edge)
        to.append(come)
        heapq.heappush(self.events, (come, rank))
