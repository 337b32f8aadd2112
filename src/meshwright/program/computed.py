"""Attention that is computed op by op: products with scores, found from the graph.

A model's own attention, or a kernel's with dropout, is matrix products around a softmax:

    queries x keys -> scores -> .. softmax .. -> x values -> output

and the same again in the backward pass. Products that make or read scores are found from the
softmax; the tables that they read and make besides, (samples, heads, .., ..), are *ends*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.program.program import Op, Program

__all__ = ["Ends", "attentions"]

_SOFTMAX = frozenset({"aten._softmax", "aten._safe_softmax"})
_SLOPE = "aten._softmax_backward_data"
_PRODUCTS = frozenset({"aten.bmm", "aten.baddbmm"})
_STOPS = _PRODUCTS | {"aten.mm", "aten.addmm", "aten.convolution", "meshwright.expert_mm"}


@dataclass(slots=True)
class Ends:
    """Where one attention begins and ends.

    Attributes:
        softmax: forward op.
        reads: values that its products read: queries, keys, values, gradients of outputs.
        makes: values that come of them: outputs, gradients of the others.
        inside: ops between.
    """

    softmax: Op
    reads: dict[int, None] = field(default_factory=dict)
    makes: dict[int, None] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)


def attentions(program: Program) -> tuple[Ends, ...]:
    """Each attention of a program whose ends are tables of heads; where they are not, none."""
    graph = _Graph(program, program.producers(), program.readers())
    found = (graph.ends(op) for op in program.ops if op.base in _SOFTMAX)
    return tuple(ends for ends in found if ends is not None)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A program, who makes its values and who reads them."""

    program: Program
    makers: Mapping[int, int]
    readers: Mapping[int, Sequence[int]]

    def ends(self, softmax: Op) -> Ends | None:
        """Those of the attention around a softmax."""
        ops = self.program.ops
        scores = self._flow(softmax.results, self._onward)
        slopes = [
            ops[number].inputs[0]
            for number in sorted(scores.ops)
            if ops[number].base == _SLOPE and softmax.results[0] in ops[number].inputs[1:]
        ]
        before = self._flow((softmax.inputs[0], *slopes), self._back)
        products = {n for n in scores.stops | before.stops if ops[n].base in _PRODUCTS}
        found = Ends(softmax)
        between = scores.values | before.values
        for number in sorted(products):
            op = ops[number]
            batch = self.program.values[op.results[0]].shape[0]
            for value in op.inputs[-2:]:
                if value not in scores.values:
                    table = self._table_before(value, batch, found.inside)
                    if table is None:
                        return None
                    found.reads[table] = None
            if op.results[0] not in between:
                tables = self._tables_after(op.results[0], batch, found.inside)
                if not tables:
                    return None
                found.makes |= dict.fromkeys(tables)
        found.inside |= products
        return found if found.reads and found.makes else None

    def _flow(self, values: Iterable[int], onward: Callable[[int], Iterable[int]]) -> _Flow:
        """Values and ops that one comes to from these; products stop it."""
        flow = _Flow(set(values), set(), set())
        waiting = list(flow.values)
        while waiting:
            for number in onward(waiting.pop()):
                if number in flow.ops or number in flow.stops:
                    continue
                op = self.program.ops[number]
                if op.base in _STOPS:
                    flow.stops.add(number)
                    continue
                flow.ops.add(number)
                more = op.results if onward == self._onward else op.inputs
                waiting += [value for value in more if value not in flow.values]
                flow.values |= set(more)
        return flow

    def _onward(self, value: int) -> Iterable[int]:
        return self.readers.get(value, ())

    def _back(self, value: int) -> Iterable[int]:
        return (self.makers[value],) if value in self.makers else ()

    def _is_table(self, value: int, batch: int) -> bool:
        shape = self.program.values[value].shape
        return len(shape) == 4 and shape[0] * shape[1] == batch

    def _table_before(self, value: int, batch: int, inside: set[int]) -> int | None:
        """The table of heads that a product's operand is a view or a multiple of."""
        while not self._is_table(value, batch):
            number = self.makers.get(value)
            if number is None or len(self.program.ops[number].inputs) != 1:
                return None
            inside.add(number)
            (value,) = self.program.ops[number].inputs
        return value

    def _tables_after(self, value: int, batch: int, inside: set[int]) -> list[int]:
        """The tables of heads that a product's result becomes; none if it becomes another thing."""
        if self._is_table(value, batch):
            return [value]
        found = []
        for number in self.readers.get(value, ()):
            op = self.program.ops[number]
            if op.base in _STOPS or len(op.results) != 1:
                return []
            inside.add(number)
            more = self._tables_after(op.results[0], batch, inside)
            if not more:
                return []
            found += more
        return found


@dataclass(slots=True)
class _Flow:
    """What one comes to: values, the ops between them, the products at which it stops."""

    values: set[int]
    ops: set[int]
    stops: set[int]
