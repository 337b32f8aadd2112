"""Recurrence: the best pipeline between two states, on the units of each level of a machine.

    A(k, i..j, m) = min of  T(k, i..j, m)                                         one stage
                            min over s, r of max(A(k, i..s, m - r), C(k, s), T(k, s..j, r))

Level k has units that are whole machines of level k - 1; `T(k, i..j, m)` is m of these side by
side, each of which runs `A(k - 1, i..j)` on all that it has; `C(k, s)` sends what crosses at s. How
long T and C are is the rule's to say. What a stage holds depends on how many workers come after it,
so with a bound on memory `A` is told that too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

from meshwright.errors import PlanError
from meshwright.predict.antichain import State
from meshwright.predict.machine import Level, Memory

__all__ = ["Recurrence", "Rule", "Span", "solve"]

_UNDER = 1 - 1e-12
"""A bound is taken this much lower, so that rounding never makes it cut off the best."""

_DEEP = 200
"""Stages beyond which a recursion through all of them would be too deep for Python."""


class Rule(Protocol):
    """How long stages and transfers take, in seconds per mini-batch."""

    def stage(self, level: int, inner: float, weights: float, units: int, *, alone: bool) -> float:
        """`units` side by side that each take `inner`; `alone` if no stage is before it."""
        ...

    def sent(self, level: int, split: int, last: int, units: int) -> float:
        """What crosses at `split` to the `units` that go on until `last`."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """A stage: from one state's number to another's; of each level, outermost first, its units."""

    first: int
    last: int
    shape: tuple[int, ...]


class _Ask(NamedTuple):
    """An entry of `A`: a level, the states i and j, units, workers after these per copy of them."""

    level: int
    first: int
    last: int
    units: int
    after: Fraction


@dataclass(frozen=True, slots=True)
class _Cell:
    """The best of `A`: its seconds, where its last stage begins, and that stage's units."""

    seconds: float
    split: int
    units: int


def solve(
    states: Sequence[State],
    levels: Sequence[Level],
    rule: Callable[[Sequence[State]], Rule],
    *,
    straight: bool = False,
    memory: Memory | None = None,
) -> Recurrence:
    """The recurrence of states. First it tries a chain of them only, so as to know a bound."""
    chain = [states[0]]
    for state in states[1:]:
        if not chain[-1].mask & ~state.mask:
            chain.append(state)
    limit = math.inf
    if len(chain) < len(states):
        quick = Recurrence(chain, levels, rule(chain), straight=straight, memory=memory)
        limit = math.nextafter(quick.seconds / _UNDER, math.inf)
    return Recurrence(states, levels, rule(states), straight=straight, memory=memory, limit=limit)


class Recurrence:
    """`A`, each entry computed once, when it is asked for."""

    def __init__(
        self,
        states: Sequence[State],
        levels: Sequence[Level],
        rule: Rule,
        *,
        straight: bool = False,
        memory: Memory | None = None,
        limit: float = math.inf,
    ) -> None:
        """Of states in an order in which each comes after those within it.

        What takes `limit` seconds or more is not found.
        """
        self._states = states
        self._levels = levels
        self._rule = rule
        self._straight = straight
        self._memory = memory
        self._cells: dict[_Ask, _Cell] = {}
        self._workers = [math.prod(level.units for level in levels[:k]) for k in range(len(levels))]
        self._within: dict[int, list[int]] = {}
        above = [math.prod(level.units for level in levels[k + 1 :]) for k in range(len(levels))]
        self._limits = [limit * units for units in above]

    @property
    def seconds(self) -> float:
        """Of the best pipeline of all layers on all units; infinite where none is possible.

        Raises:
            PlanError: it has more stages, of many workers, than can be searched through.
        """
        try:
            return self._top().seconds
        except RecursionError:
            raise PlanError(
                f"a pipeline of {len(self._states) - 1} layers with replicated stages may have "
                "hundreds of stages, which is too deep a search; ask for a straight one, or join "
                "layers that belong together"
            ) from None

    def spans(self) -> Iterator[Span]:
        """The stages of the best pipeline, in order."""
        top = len(self._levels) - 1
        yield from self._spans(top, 0, len(self._states) - 1, Fraction(0), ())

    def side_by_side(self) -> float:
        """Seconds of all layers on all units with no cut at all: data parallelism."""
        last = len(self._states) - 1
        found = self._states[last].seconds
        for level, of in enumerate(self._levels):
            weights = self._states[last].weights
            found = self._rule.stage(level, found, weights, of.units, alone=True)
        return found

    def _top(self) -> _Cell:
        top = len(self._levels) - 1
        last = len(self._states) - 1
        return self._cell(_Ask(top, 0, last, self._levels[top].units, Fraction(0)))

    def _unit(self, level: int, first: int, last: int, after: Fraction) -> float:
        """What one unit of a level takes for what lies between two states."""
        if level:
            units = self._levels[level - 1].units
            return self._cell(_Ask(level - 1, first, last, units, after)).seconds
        begin, end = self._states[first], self._states[last]
        if self._memory is not None:
            weights, kept = end.weights - begin.weights, end.activations - begin.activations
            if self._memory.need(weights, kept, after) > self._memory.capacity:
                return math.inf
        return end.seconds - begin.seconds

    def _stage(
        self, level: int, first: int, last: int, units: int, after: Fraction, *, alone: bool
    ) -> float:
        inner = self._unit(level, first, last, after)
        weights = self._states[last].weights - self._states[first].weights
        return self._rule.stage(level, inner, weights, units, alone=alone)

    def _own(self, ask: _Ask, width: int) -> Fraction:
        """Workers after a last stage of `width` units, per copy of it."""
        if self._memory is None:
            return ask.after
        beyond = self._levels[ask.level].units - ask.units
        return (beyond * self._workers[ask.level] + ask.after) / width

    def _cell(self, ask: _Ask) -> _Cell:
        found = self._cells.get(ask)
        if found is None:
            found = self._cells[ask] = self._best(ask)
        return found

    def _best(self, ask: _Ask) -> _Cell:
        level, first, last, units, _ = ask
        if self._straight and units == self._levels[level].units > _DEEP:
            self._fill(ask)
        best = _Cell(self._limits[level], -1, units)
        if units == 1 or not self._straight:
            own = self._own(ask, units)
            alone = self._stage(level, first, last, units, own, alone=True)
            if alone < best.seconds:
                best = _Cell(alone, first, units)
        for width in range(1, min(units, 2) if self._straight else units):
            best = self._split(ask, width, best)
        return best if best.split >= 0 else _Cell(math.inf, -1, units)

    def _fill(self, ask: _Ask) -> None:
        """Compute the entries that `ask` may need, those of fewer units first."""
        for units in range(1, ask.units):
            for split in self._between(ask.first, ask.last):
                self._cell(ask._replace(last=split, units=units))

    def _split(self, ask: _Ask, width: int, best: _Cell) -> _Cell:
        """The better of `best` and what ends in a stage of `width` units."""
        level, first, last, units, after = ask
        own = self._own(ask, width)
        # No stage is faster than its compute on all its workers, nor are some than their mean.
        latter = width * self._workers[level] / _UNDER
        former = (units - width) * self._workers[level] / _UNDER
        begin, end = self._states[first].seconds, self._states[last].seconds
        for split in self._between(first, last):
            cut = self._states[split].seconds
            if end - cut >= best.seconds * latter:
                break  # those that follow leave the last stage even more
            if cut - begin >= best.seconds * former:
                continue
            cost = self._rule.sent(level, split, last, width)
            if cost < best.seconds:
                cost = max(cost, self._stage(level, split, last, width, own, alone=False))
            if cost < best.seconds:
                rest = _Ask(level, first, split, units - width, after)
                cost = max(cost, self._cell(rest).seconds)
            if cost < best.seconds:
                best = _Cell(cost, split, width)
        return best

    def _between(self, first: int, last: int) -> Iterator[int]:
        """The states within `last` that `first` is within, the largest first."""
        if last not in self._within:
            mask = self._states[last].mask
            within = [n for n in range(last - 1, -1, -1) if not self._states[n].mask & ~mask]
            self._within[last] = within
        mask = self._states[first].mask
        for split in self._within[last]:
            if split <= first:
                return
            if not mask & ~self._states[split].mask:
                yield split

    def _spans(
        self, level: int, first: int, last: int, after: Fraction, shape: tuple[int, ...]
    ) -> Iterator[Span]:
        if level < 0:
            yield Span(first, last, shape)
            return
        units, found = self._levels[level].units, []
        while units:
            ask = _Ask(level, first, last, units, after)
            cell = self._cell(ask)
            found.append((cell.split, last, self._own(ask, cell.units), cell.units))
            units, last = units - cell.units, cell.split
        for begin, end, own, width in reversed(found):
            yield from self._spans(level - 1, begin, end, own, (*shape, width))
