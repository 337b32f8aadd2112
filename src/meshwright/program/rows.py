"""Weights that no column was found for, split by what they contract or look up instead.

A table's rows are split where they are looked up: each rank finds its own, and the sums are added
up at once (Shoeybi et al. 2019, section 3). A weight may be split along the dim that it contracts
where what it reads can be made in parts from values that are whole: heads of attention whose fused
projection has parts of other sizes, channels of a scan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Shard
from meshwright.program.program import Op, Program
from meshwright.program.propagate import Completed
from meshwright.program.rules import Carry, Rule, carry_of, shard_of

__all__ = ["rows"]

_WORTH = 4
"""A table is split unless what is looked up in it is so many times larger."""


def rows(program: Program, completed: Completed, axis: Axis) -> dict[int, Shard]:
    """The inputs that `axis` may split by rows, of those that it has left whole.

    Args:
        program: of a micro-batch, with global shapes.
        completed: its annotations so far.
        axis: of the mesh.
    """
    search = _Search.of(program, completed, axis)
    found: dict[int, Shard] = {}
    for number, op in enumerate(search.ops):
        if axis.name in dict(completed.carried[number]):
            continue
        for value, shard in (*search.tables(op, number), *search.contracted(op, number)):
            found.setdefault(value, shard)
    return found


@dataclass(frozen=True, slots=True)
class _Search:
    """The forward part of a program over one axis.

    Attributes:
        weights: value -> the input that it is, or is a view of, and through which ops.
    """

    program: Program
    completed: Completed
    axis: Axis
    ops: tuple[Op, ...]
    producers: dict[int, int]
    weights: dict[int, tuple[int, tuple[int, ...]]]

    @classmethod
    def of(cls, program: Program, completed: Completed, axis: Axis) -> _Search:
        """With the weights that the axis has left whole."""
        places = completed.places.get(axis.name, {})
        weights: dict[int, tuple[int, tuple[int, ...]]] = {
            value: (value, ())
            for name, value in program.inputs
            if name.startswith("model/") and places.get(value) is None
        }
        ops = tuple(takewhile(lambda op: op.phase == "forward", program.ops))
        for number, (op, rule) in enumerate(zip(ops, completed.rules, strict=False)):
            views = rule.linear or op.base == "aten._to_copy"
            if len(op.inputs) == len(op.results) == 1 and views and op.inputs[0] in weights:
                source, chain = weights[op.inputs[0]]
                weights[op.results[0]] = (source, (*chain, number))
        return cls(program, completed, axis, ops, dict(program.producers()), weights)

    def tables(self, op: Op, number: int) -> Iterator[tuple[int, Shard]]:
        """Weights that rows are looked up in."""
        rule = self.completed.rules[number]
        if rule.window is None:
            return
        carry = Carry(rule.window[0])
        made = sum(self.program.values[v].bytes for v in op.results)
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            shard = shard_of(rule, dims, carry)
            if shard is None or value not in self.weights or self.weights[value][1]:
                continue
            if (
                made <= _WORTH * self.program.values[value].bytes
                and rule.sizes[carry.factor] >= self.axis.size
            ):
                yield value, shard

    def contracted(self, op: Op, number: int) -> Iterator[tuple[int, Shard]]:
        """Weights that contract what can be made in parts."""
        rule = self.completed.rules[number]
        for place, value in enumerate(op.inputs):
            if value not in self.weights:
                continue
            for factor in _summed(rule, place):
                even = rule.sizes[factor] % self.axis.size == 0
                carry = Carry(factor, 1, rule.sizes[factor] // self.axis.size if even else 1)
                shard = self._at_rest(value, shard_of(rule, rule.operands[place], carry))
                if shard is None or rule.sizes[factor] < self.axis.size:
                    continue
                read = {
                    other: split
                    for other, dims in zip(op.inputs, rule.operands, strict=True)
                    if (split := shard_of(rule, dims, carry)) is not None and other != value
                }
                if not read.keys() & self.weights.keys() and self._made_in_parts(read):
                    yield self.weights[value][0], shard

    def _at_rest(self, value: int, shard: Shard | None) -> Shard | None:
        """The shard of the input that `value` is a view of."""
        for number in reversed(self.weights[value][1]):
            if shard is None:
                return None
            rule = self.completed.rules[number]
            carry = carry_of(rule, rule.results[0], shard)
            shard = None if carry is None else shard_of(rule, rule.operands[0], carry)
        return shard

    def _made_in_parts(self, wanted: dict[int, Shard]) -> bool:
        """Whether values so split are the outcome of products that can be split alike.

        Where the split ends, a value that is whole is sliced, for nothing.
        """
        queue, seen, heavy = list(wanted.items()), set(wanted), False
        while queue:
            value, shard = queue.pop()
            number = self.producers.get(value)
            if number is None:
                continue
            op, rule = self.program.ops[number], self.completed.rules[number]
            if self.axis.name in dict(self.completed.carried[number]):
                return False
            carry = carry_of(rule, rule.results[op.results.index(value)], shard)
            if carry is None:
                continue
            whole = [place for place, v in enumerate(op.inputs) if v not in self.weights]
            heavy |= any(len(_summed(rule, place, whole)) > 0 for place in whole)
            for operand, dims in zip(op.inputs, rule.operands, strict=True):
                split = shard_of(rule, dims, carry)
                if split is not None and operand not in seen:
                    seen.add(operand)
                    queue.append((operand, split))
        return heavy


def _summed(rule: Rule, place: int, among: list[int] | None = None) -> set[int]:
    """Factors of an operand that it shares with another one and no result has."""
    kept = {factor for dims in rule.results for dim in dims for factor in dim}
    others = {
        factor
        for other, dims in enumerate(rule.operands)
        if other != place and (among is None or other in among)
        for dim in dims
        for factor in dim
    }
    return {factor for dim in rule.operands[place] for factor in dim} & others - kept
