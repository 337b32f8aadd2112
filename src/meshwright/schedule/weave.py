"""A rank's order, woven from a short pattern; what all generators here are written in.

A pattern is lines of `(times, words)`. A word is a kind and a lane: `F0` takes the next forward of
lane 0, `B0` or `I0` its next backward (whole, or the part for the inputs), `W0` the weights' part
that has waited longest in lane 0, and `W` the one that has waited longest in any lane. A lane is
one chunk of the rank, or all of them when their order is fixed. A word whose lane has run dry is
skipped, so the shape of a schedule is written once, however few its micro-batches are:

    ((2, "F"), (4, "F B"))        0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshwright.schedule.action import Action, Kind

__all__ = ["Lane", "Pattern", "Unit", "chunk", "weave"]

Unit = tuple[int, int]
"""A stage and a micro-batch."""

Pattern = Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Lane:
    """The orders in which forwards and backwards are taken."""

    forwards: Sequence[Unit]
    backwards: Sequence[Unit]


def chunk(stage: int, microbatches: int) -> Lane:
    """One stage, its micro-batches in order."""
    units = [(stage, microbatch) for microbatch in range(microbatches)]
    return Lane(units, units)


def weave(pattern: Pattern, lanes: Mapping[str, Lane]) -> tuple[Action, ...]:
    """The actions of one rank.

    >>> [str(action) for action in weave([(1, "F"), (2, "F I W")], {"": chunk(0, 2)})]
    ['0F0', '0F1', '0I0', '0W0', '0I1', '0W1']
    """
    return tuple(_Loom(lanes).run(pattern))


class _Loom:
    """What is left of every lane while a pattern is run."""

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        self._left: dict[str, deque[Action]] = {}
        for name, lane in lanes.items():
            self._left[f"F{name}"] = _actions("F", lane.forwards)
            self._left[f"B{name}"] = _actions("B", lane.backwards)
        self._owed: list[tuple[str, Action]] = []  # weight parts, oldest first, with their lanes

    def run(self, pattern: Pattern) -> Iterable[Action]:
        for times, words in pattern:
            parts = [(word[0], word[1:]) for word in words.split()]
            for _ in range(times):
                for kind, lane in parts:
                    yield from self._take(kind, lane)

    def _take(self, kind: str, lane: str) -> Iterable[Action]:
        if kind == "W":
            return self._pay(lane)
        left = self._left[f"{'F' if kind == 'F' else 'B'}{lane}"]
        if not left:
            return ()
        action = left.popleft()
        return (action,) if kind != "I" else (self._split(action, lane),)

    def _split(self, action: Action, lane: str) -> Action:
        self._owed.append((lane, Action(action.stage, "W", action.microbatch)))
        return Action(action.stage, "I", action.microbatch)

    def _pay(self, lane: str) -> Iterable[Action]:
        for index, (owner, action) in enumerate(self._owed):
            if lane in ("", owner):
                del self._owed[index]
                return (action,)
        return ()


def _actions(kind: Kind, units: Sequence[Unit]) -> deque[Action]:
    return deque(Action(stage, kind, microbatch) for stage, microbatch in units)
