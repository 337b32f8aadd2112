"""Branch and bound over the orders of a small step: what it ends with is proved to be best.

At every node, of all actions that could come next, take the one that would end first. Some best
schedule goes on, on that action's rank, with an action that can begin before that end (Giffler and
Thompson 1960): any later one would leave room for it. Where the action takes memory this does not
follow, since memory may be wanted for another; so there is one more branch that holds it back until
its rank has done something else. Nodes are cut that cannot beat the best schedule so far, or that
are nowhere earlier than a node that has done the same. No part of a backward is taken to be longer
than the whole.
"""

from __future__ import annotations

from meshwright.schedule.action import Schedule
from meshwright.schedule.problem import Problem
from meshwright.schedule.state import Option, State, Step

__all__ = ["improve"]

_MOST_ACTIONS = 200
_KEPT = 12
"""Nodes remembered of those that have done the same."""


def improve(
    problem: Problem, best: float, least: float, effort: int
) -> tuple[Schedule | None, float]:
    """A schedule shorter than `best`, if there is one, and a bound; the two meet when proved."""
    if 3 * len(problem.placement) * problem.microbatches > _MOST_ACTIONS:
        return None, least
    tree = _Tree(problem, best, least, effort)
    tree.grow()
    return tree.found, tree.best if tree.effort > 0 else least


class _Tree:
    """The node that is looked at, changed in place on the way down and put back on the way up."""

    def __init__(self, problem: Problem, best: float, least: float, effort: int) -> None:
        self.problem, self.best, self.least, self.effort = problem, best, least, effort
        self.state = State(problem)
        self.found: Schedule | None = None
        self.held_back: frozenset[Step] = frozenset()
        self.seen: dict[object, list[tuple[float, ...]]] = {}

    def grow(self) -> None:
        """Look at everything below this node."""
        self.effort -= 1
        if self.effort <= 0 or self.best <= self.least * (1 + 1e-12):
            return
        options = [o for o in self.state.options() if (o.kind, o.stage) not in self.held_back]
        if not options:
            self._leaf()
        elif self.state.bound() < self.best * (1 - 1e-12) and not self._is_dominated():
            self._branch(options)

    def _leaf(self) -> None:
        end = max(self.state.free)
        if self.state.is_done() and end < self.best * (1 - 1e-12):
            self.best, self.found = end, self.state.schedule()

    def _branch(self, options: list[Option]) -> None:
        first = min(options, key=lambda option: (option.end, option.rank, option.stage))
        rivals = [o for o in options if o.rank == first.rank and o.begin < first.end]
        before = self.held_back
        for option in sorted({first, *rivals}, key=_promise):
            mine = self.state.mine[option.rank]
            self.held_back = frozenset(step for step in before if step[1] not in mine)
            back = self.state.take(option)
            self.grow()
            self.state.undo(option, back)
        if self._takes_memory(first):
            self.held_back = before | {(first.kind, first.stage)}
            self.grow()
        self.held_back = before

    def _takes_memory(self, option: Option) -> bool:
        if option.kind == "B":  # its parts may be wanted instead, and not fit yet
            return self.state.delta("I", option.stage) > 0
        return self.state.delta(option.kind, option.stage) > 0

    def _is_dominated(self) -> bool:
        state = self.state
        key = (tuple(state.forwards), tuple(state.backwards), tuple(state.owed), self.held_back)
        times = tuple(state.times())
        kept = self.seen.setdefault(key, [])
        if any(all(a <= b for a, b in zip(old, times, strict=True)) for old in kept):
            return True
        if len(kept) < _KEPT:
            kept.append(times)
        return False


def _promise(option: Option) -> tuple[int, float, int]:
    return ("IBFW".index(option.kind), option.begin, -option.stage)
