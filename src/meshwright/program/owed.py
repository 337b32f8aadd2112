"""Where partial sums are paid for: as late as possible, but not twice.

A sum that is owed passes through linear ops, so that several meet and are paid for at once. But
where what is made of one value would be paid for at more than one place (a gradient and its
transpose, a residual and its square), the value itself is paid for where it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Partial, Placement, Shard
from meshwright.program.program import Op, Program
from meshwright.program.propagate import Completed
from meshwright.program.rules import Rule, shard_of

__all__ = ["paid_where_made"]


def paid_where_made(
    program: Program,
    completed: Completed,
    axes: Sequence[Axis],
    outputs: Mapping[str, Layout],
) -> dict[str, frozenset[int]]:
    """Per axis, the values that are paid for as soon as they are made, if they are partial.

    Args:
        program: the global one.
        completed: its rules, carried factors and places.
        axes: of the mesh.
        outputs: output name -> the layout to deliver; those not named stay as they come.
    """
    found: dict[str, frozenset[int]] = {}
    inputs = [op.inputs for op in program.ops]
    for axis in axes:
        early: frozenset[int] = frozenset()
        for _ in range(_ROUNDS if axis.size > 1 else 0):  # what is paid for owes nothing later
            early = _Prices(program, completed, axis.name, early, inputs).early(outputs)
        found[axis.name] = early
    return found


_ROUNDS = 3

_LATENCY = 1 << 16
"""Bytes that could travel while a collective gets under way."""


@dataclass(slots=True)
class _Need:
    """What the readers of a value ask for, if it comes as a partial sum.

    Attributes:
        places: where readers need it paid for.
        later: what the sums that linear readers make of it will cost, in bytes that travel.
    """

    places: set[Placement] = field(default_factory=set)
    later: int = 0


class _Prices:
    """Prices over one axis, from the last op to the first."""

    def __init__(
        self,
        program: Program,
        completed: Completed,
        axis: str,
        paid: frozenset[int],
        inputs: Sequence[tuple[int, ...]],
    ) -> None:
        self.program = program
        self.inputs = inputs  # of each op
        self.completed = completed
        self.axis = axis
        self.known = completed.places.get(axis, {})
        self.needs: dict[int, _Need] = {}
        self.owing = self._owing(paid)

    def early(self, outputs: Mapping[str, Layout]) -> frozenset[int]:
        """The values for which paying at once is cheaper."""
        for name, value in self.program.outputs:
            if name in outputs:
                place = outputs[name].on(self.axis)
                if not isinstance(place, Partial):
                    self._need(value).places.add(place)
        for number in reversed(range(len(self.program.ops))):
            self._read(number)
        ops = zip(self.inputs, self.completed.rules, strict=True)
        termwise = {values[0] for values, rule in ops if self.axis in rule.apart}
        dear = (v for v in self.needs if self._waiting(v) > self._at_once(v))
        return frozenset(dear) - termwise

    def _owing(self, paid: frozenset[int]) -> set[int]:
        """Values that come as a partial sum, where those in `paid` are paid for."""
        found: set[int] = set()
        for number, op in enumerate(self.program.ops):
            rule = self.completed.rules[number]
            carry = dict(self.completed.carried[number]).get(self.axis)
            made: set[int] = set()
            if carry is not None:
                dims = zip(op.results, rule.results, strict=True)
                made = {value for value, d in dims if shard_of(rule, d, carry) is None}
            elif found and any(self.inputs[number][place] in found for place in self._open(rule)):
                made = set(op.results)
            found |= made - paid
        return found

    def _open(self, rule: Rule) -> frozenset[int]:
        """The operands of which a partial sum may pass through."""
        return frozenset({0}) if self.axis in rule.apart else frozenset().union(*rule.linear)

    def _need(self, value: int) -> _Need:
        return self.needs.setdefault(value, _Need())

    def _at_once(self, value: int) -> int:
        """An all-reduce; 16 bits are summed in 32."""
        made = self.program.values[value]
        return 2 * max(made.bytes, 4 * made.elements) + _LATENCY

    def _waiting(self, value: int) -> int:
        """Paying for the value where that must be, and for what is made of it later."""
        need = self.needs.get(value, _Need())
        if not need.places:
            return need.later
        whole = None in need.places or len(need.places) > 1
        return need.later + self._at_once(value) // (1 if whole else 2)

    def _read(self, number: int) -> None:
        """What op `number` asks of its operands."""
        op, rule, inputs = (
            self.program.ops[number],
            self.completed.rules[number],
            self.inputs[number],
        )
        price = sum(min(self._waiting(v), self._at_once(v)) for v in op.results)
        owing = {*inputs} & self.owing
        for value in dict.fromkeys(inputs):
            places = {place for place, other in enumerate(inputs) if other == value}
            asked = self._asked(number, op, rule, places)
            if asked is None:  # what comes together is paid for together, in proportion
                owed = sum(self.program.values[v].bytes for v in owing | {value})
                share = price * self.program.values[value].bytes // owed if owed else 0
                self._need(value).later += share
            else:
                self._need(value).places |= asked

    def _asked(self, number: int, op: Op, rule: Rule, places: set[int]) -> set[Placement] | None:
        """Where op needs the operand at `places` to lie; None if a partial sum passes through."""
        carry = dict(self.completed.carried[number]).get(self.axis)
        if op.base == "meshwright.annotate":
            said = {self.known[v] for v in op.results if v in self.known}
            return said or None
        if carry is None:
            whole: set[Placement] = {None}
            if self.axis in rule.apart:
                return None
            passes = any(self._passes(number, group, places) for group in rule.linear)
            return None if passes else whole
        if places <= rule.addends and all(shard_of(rule, d, carry) is None for d in rule.results):
            return set()
        return {shard_of(rule, rule.operands[place], carry) for place in places}

    def _passes(self, number: int, group: frozenset[int], places: set[int]) -> bool:
        """Whether partial sums pass through a group of operands in which the op is linear."""
        others = (self.inputs[number][place] for place in group - places)
        return places <= group and not any(isinstance(self.known.get(v), Shard) for v in others)
