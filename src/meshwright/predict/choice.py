"""Choice: an integer program for what is saved (after Checkmate, Jain et al. 2020).

Each op is repeated once at most. Per storage v and forward op o that makes it:

    s_v   v is saved                 s_v + r_o >= 1       where the backward reads v
    r_o   o is repeated              s_v + r_o >= r_w     where the op w reads v
    e_ot  o has been repeated at t   r_o, once an op that needs it is due: max over these

At the time t of a backward op, v takes its bytes

    saved      s_v          until its last reader; s_v and r_w and not e_w,t-1 for one repeated, w
    repeated   e_ot         likewise

which are linear in s, r, e and an auxiliary variable for each `and`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwright.errors import PlanError
from meshwright.predict.saving import Saving, Storage

__all__ = ["NODES", "Choice", "Solved"]

NODES = 2000
"""Of the search tree; what is found by then is taken, as not proved. No clock: ranks must agree."""

_GAP = 1e-3
"""By how much of its cost a choice may be worse than the best."""

_INFEASIBLE = 2
"""What scipy says of a program without a solution."""

_ONE = -1
"""In an expression, the constant's place."""

Expression = dict[int, float]
"""Variable -> its factor."""

_NEVER: Expression = {}


@dataclass(frozen=True, slots=True)
class Solved:
    """What the solver found.

    Attributes:
        kept: the storages to save; None where it came to no choice.
        proved: that there is no better, or none at all.
    """

    kept: frozenset[int] | None
    proved: bool


@dataclass(slots=True)
class Choice:
    """The integer program of a micro-batch, in which memory counts at some times.

    Attributes:
        saving: what may be chosen.
        upper: of each variable, its upper bound.
        rows: expressions that must not be negative.
        saved, repeated: variables by storage, and by op.
        begun: what tells whether an op has been repeated by a time.
        soonest: the first time at which an op can be repeated.
        held: bytes at each time that counts.
    """

    saving: Saving
    upper: list[float] = field(default_factory=list)
    rows: list[Expression] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    begun: dict[tuple[int, int], Expression] = field(default_factory=dict)
    soonest: dict[int, int] = field(default_factory=dict)
    held: list[Expression] = field(default_factory=list)

    @classmethod
    def of(cls, saving: Saving, times: Collection[int]) -> Choice:
        """With rows for memory at `times`."""
        made = cls(saving)
        made.saved = {value: made.new() for value in saving.storages}
        made.repeated = {number: made.new() for number in saving.works}
        for value, storage in saving.storages.items():
            there = {made.saved[value]: 1.0, made.repeated[storage.maker]: 1.0}
            if storage.first is not None:
                made.rows.append({**there, _ONE: -1.0})
            for reader in storage.readers:
                made.rows.append({**there, made.repeated[reader]: -1.0})
        for number in saving.works:
            made.wanted(number)
        made.soonest = _soonest(saving)
        made.held = [made.bytes_at(time) for time in sorted(times)]
        return made

    def new(self, most: float = 1.0) -> int:
        """A variable."""
        self.upper.append(most)
        return len(self.upper) - 1

    def wanted(self, number: int) -> None:
        """An op is repeated only for what is read and not saved."""
        again: Expression = {self.repeated[number]: 1.0}
        makes = self.saving.works[number].makes
        missing: list[Expression] = [{_ONE: 1.0, self.saved[value]: -1.0} for value in makes]
        reasons: list[Expression] = []
        for value, absent in zip(makes, missing, strict=True):
            storage = self.saving.storages[value]
            reasons += [{self.repeated[reader]: 1.0} for reader in storage.readers]
            reasons += [] if storage.first is None else [absent]
        self.rows.append(_sum(*missing, (again, -1.0)))
        self.rows.append(_sum(*reasons, (again, -1.0)))

    def cheapest(self, limit: int, nodes: int) -> Solved:
        """The least work again within a limit, as far as so many nodes of a search tree tell."""
        if any(held.get(_ONE, 0.0) > limit for held in self.held):
            return Solved(None, proved=True)  # what is always there is too much already
        if not self.saved:
            return Solved(frozenset(), proved=True)
        room = [_sum({_ONE: float(limit)}, (held, -1.0)) for held in self.held]
        rows = [*self.rows, *(_scaled(row, 1 / max(limit, 1)) for row in room)]
        costs = {v: self.saving.works[number].cost for number, v in self.repeated.items()}
        whole = {*self.saved.values(), *self.repeated.values()}
        result = _milp(rows, self.upper, whole, costs, nodes)
        if result.x is None:
            return Solved(None, result.status == _INFEASIBLE)
        kept = frozenset(v for v, place in self.saved.items() if result.x[place] > 0.5)
        return Solved(kept, result.status == 0)

    def bytes_at(self, time: int) -> Expression:
        """The bytes at a time."""
        terms: list[tuple[Expression, float]] = [({_ONE: 1.0}, float(self.saving.fixed[time]))]
        for value, storage in self.saving.storages.items():
            size = float(storage.bytes)
            saved: Expression = {self.saved[value]: 1.0}
            terms.append((saved, size * (storage.copies - 1)))
            if time < self.saving.end:
                terms.append((saved, size * (storage.until < time)))
                continue
            terms.append((self._saved_at(value, storage, time), size))
            terms.append((self._again_at(value, storage, time), size))
        for number, work in self.saving.works.items():
            if work.spare and time >= self.saving.end:
                terms.append((self.begun_at(number, time), float(work.spare)))
                terms.append((self.begun_at(number, time - 1), -float(work.spare)))
        return _sum(*terms)

    def _saved_at(self, value: int, storage: Storage, time: int) -> Expression:
        """Whether a storage is there since the forward."""
        saved: Expression = {self.saved[value]: 1.0}
        if storage.last is not None and storage.last >= time:
            return saved
        return self._any(_sum(saved, ({_ONE: 1.0}, -1.0), (pending, 1.0))
                         for pending in self._pending(storage, time))  # fmt: skip

    def _again_at(self, value: int, storage: Storage, time: int) -> Expression:
        """Whether a storage is there that was made again."""
        begun = self.begun_at(storage.maker, time)
        if not begun:
            return begun
        just = _sum(begun, (self.begun_at(storage.maker, time - 1), -1.0))
        # An op that makes several may be repeated for another one.
        several = len(self.saving.works[storage.maker].makes) > 1
        needed = _sum(begun, ({self.saved[value]: 1.0}, -1.0)) if several else begun
        if storage.last is not None and storage.last >= time:
            return self._any([needed, just]) if several else begun
        later = (
            _sum(needed, ({_ONE: 1.0}, -1.0), (pending, 1.0))
            for pending in self._pending(storage, time)
        )
        return self._any([just, *later])

    def _pending(self, storage: Storage, time: int) -> Iterable[Expression]:
        """Of each reader that may be repeated: whether it is, and not before this time."""
        for reader in storage.readers:
            left = _sum({self.repeated[reader]: 1.0}, (self.begun_at(reader, time - 1), -1.0))
            if left:
                yield left

    def begun_at(self, number: int, time: int) -> Expression:
        """Whether an op has been repeated by a time."""
        if self.soonest.get(number, len(self.saving.fixed)) > time:
            return _NEVER
        if (number, time) not in self.begun:
            self.begun[number, time] = self._begun(number, time)
        return self.begun[number, time]

    def _begun(self, number: int, time: int) -> Expression:
        """As `begun_at`.

        Ops that read come after those that make, so that this goes no deeper than programs do.
        """
        again: Expression = {self.repeated[number]: 1.0}
        makes = self.saving.works[number].makes
        single = len(makes) == 1
        due: list[Expression] = []
        for value in makes:
            storage = self.saving.storages[value]
            missing: Expression = {_ONE: 1.0, self.saved[value]: -1.0}
            if storage.first is not None and storage.first <= time:
                if single:
                    return again
                due.append(missing)
            begun = (self.begun_at(reader, time) for reader in storage.readers)
            due += [each if single else self._both(each, missing) for each in begun if each]
        found = {self.new(): 1.0}
        self.rows.append(_sum(again, (found, -1.0)))
        self.rows.append(_sum(*((each, 1.0) for each in due), (found, -1.0)))
        for each in due:
            self.rows.append(_sum(found, ({_ONE: 1.0}, 1.0), (each, -1.0), (again, -1.0)))
        return found

    def _both(self, one: Expression, other: Expression) -> Expression:
        """The lesser of two."""
        found = {self.new(): 1.0}
        self.rows.append(_sum(one, (found, -1.0)))
        self.rows.append(_sum(other, (found, -1.0)))
        self.rows.append(_sum(found, ({_ONE: 1.0}, 1.0), (one, -1.0), (other, -1.0)))
        return found

    def _any(self, each: Iterable[Expression]) -> Expression:
        """No less than any of these; nothing where there are none."""
        terms = [term for term in each if term]
        if not terms:
            return _NEVER
        found = {self.new(): 1.0}
        self.rows += [_sum(found, (term, -1.0)) for term in terms]
        return found


def _soonest(saving: Saving) -> dict[int, int]:
    """The first time at which each op can be repeated: when it, or what reads it, is wanted."""
    found: dict[int, int] = {}
    for number in sorted(saving.works, reverse=True):
        for value in saving.works[number].makes:
            storage = saving.storages[value]
            times = [found[reader] for reader in storage.readers if reader in found]
            times += [] if storage.first is None else [storage.first]
            found[number] = min([*times, found.get(number, len(saving.fixed))])
    return found


def _sum(*terms: Expression | tuple[Expression, float]) -> Expression:
    """The sum of expressions, each times a factor if one is given; what cancels is left out."""
    found: Expression = {}
    for term in terms:
        each, factor = term if isinstance(term, tuple) else (term, 1.0)
        for variable, times in each.items():
            found[variable] = found.get(variable, 0.0) + factor * times
    return {variable: factor for variable, factor in found.items() if factor}


def _scaled(expression: Expression, factor: float) -> Expression:
    return _sum((expression, factor))


def _milp(
    rows: list[Expression],
    upper: list[float],
    whole: Collection[int],
    costs: Mapping[int, float],
    nodes: int,
) -> Any:
    """HiGHS's answer: least costs with no row negative.

    Raises:
        PlanError: scipy is not installed.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise PlanError(
            "remat=budget is chosen by scipy, which is not installed; run pip install "
            "'meshwright[plan]', or use remat=full or remat=selective"
        ) from error
    entries = [(k, v, f) for k, row in enumerate(rows) for v, f in row.items() if v != _ONE]
    places, variables, factors = ([entry[part] for entry in entries] for part in range(3))
    matrix = csr_array((factors, (places, variables)), shape=(len(rows), len(upper)))
    lowest = np.array([-row.get(_ONE, 0.0) for row in rows])
    cost = np.zeros(len(upper))
    largest = max(costs.values(), default=0.0) or 1.0
    for variable, each in costs.items():
        cost[variable] = each / largest
    return milp(
        cost,
        integrality=np.array([variable in whole for variable in range(len(upper))], dtype=int),
        bounds=Bounds(0.0, np.array(upper)),
        constraints=LinearConstraint(matrix, lowest, np.inf),
        options={"node_limit": nodes, "mip_rel_gap": _GAP},
    )
