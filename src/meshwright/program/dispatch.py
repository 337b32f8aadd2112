"""Expert parallelism: rows travel to the ranks that hold their experts, and back.

Experts' weights are split over the axis `expert`, whose ranks have samples of their own. Between
the products of one layer's experts nothing but ops on rows is done, so rows travel once before the
first and once after the last (Lepikhin et al. 2020, GShard, section 3.2), as many as there are:
none is dropped, and no buffer is of the worst case.

    x -> dispatch -> expert_mm -> silu, mul -> expert_mm -> combine -> y

`dispatched` writes that into a program with global shapes, where dispatch and combine change
nothing; `routed` makes of it what a rank does:

    counts of rows by expert -> all-to-all; rows in order -> exchange of as many as were counted
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshwright.errors import InternalError
from meshwright.plan.mesh import Axis
from meshwright.program.experts import has, row_factor
from meshwright.program.layout import REPLICATED, Shard, chunk
from meshwright.program.partition import Local
from meshwright.program.program import Arg, Op, Program, Ref, Symbol, Value, map_refs
from meshwright.program.rules import Rule, rule_of

__all__ = ["AXIS", "dispatched", "routed"]

AXIS = "expert"

_MM, _WEIGHT = "meshwright.expert_mm", "meshwright.expert_mm_weight"
_DISPATCH, _COMBINE, _IDS = (f"meshwright.{n}" for n in ("dispatch", "combine", "dispatch_ids"))
_ROWS = {_MM: (0,), _WEIGHT: (0, 1)}
_IDS_OF = {_MM: 1, _WEIGHT: 2}
"""Which operands of a product are rows, and which tells their experts."""

_SIZED = dict.fromkeys(
    [f"aten.{n}" for n in ("expand", "select_backward", "slice_backward", "view", "_unsafe_view")],
    1,
)
"""Where a size stands among the arguments, whose first number is as many as the rows read."""


def dispatched(program: Program) -> Program:
    """The program whose products of experts read rows that were dispatched."""
    layers: dict[int, list[int]] = {}
    for number, op in enumerate(program.ops):
        if op.base in _ROWS:
            layers.setdefault(op.inputs[_IDS_OF[op.base]], []).append(number)
    if not layers:
        return program
    graph = _Graph(program, program.readers(), program.producers())
    inside: dict[int, int] = {}
    for ids, products in layers.items():
        inside |= dict.fromkeys(graph.between(products, inside), ids)
    experts = {ids: _count(program, program.ops[found[0]]) for ids, found in layers.items()}
    return _Dispatcher(program, inside, experts).run()


def _count(program: Program, product: Op) -> int:
    """How many experts a product has."""
    weights = product.inputs[2] if product.base == _MM else product.results[0]
    return program.values[weights].shape[0]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A program, who reads its values and who makes them."""

    program: Program
    readers: Mapping[int, Sequence[int]]
    makers: Mapping[int, int]

    def between(self, products: Sequence[int], taken: Mapping[int, int]) -> set[int]:
        """The products, and the ops on rows that are on a way from one to another."""
        ops = self.program.ops
        made = [v for n in products if ops[n].base == _MM for v in ops[n].results]
        read = [ops[n].inputs[place] for n in products for place in _ROWS[ops[n].base]]
        after, before = self.reached(made, taken, onward=True), self.reached(read, taken)
        return {*products, *(after & before)}

    def reached(
        self, values: Iterable[int], taken: Mapping[int, int], *, onward: bool = False
    ) -> set[int]:
        """The ops on rows that one comes to from these, by what reads them or what makes them."""
        found: set[int] = set()
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            makers = (self.makers[value],) if value in self.makers else ()
            for number in self.readers.get(value, ()) if onward else makers:
                op = self.program.ops[number]
                if number in found or number in taken or op.base in _ROWS:
                    continue
                rows = _rows_of(op, rule_of(op, self.program.values), value, self.program)
                if rows:
                    found.add(number)
                    waiting += [v for v in (op.results if onward else op.inputs) if v in rows]
        return found


def _rows_of(op: Op, rule: Rule, value: int, program: Program) -> frozenset[int]:
    """The operands and results that have the rows of one of them, where their count is free."""
    factor = row_factor(op, rule, value)
    if factor is None or rule.count_args or op.base == "meshwright.draw":
        return frozenset()
    count = program.values[value].shape[0]
    sizes = [k for k, arg in enumerate(op.args) if isinstance(arg, tuple) and arg[:1] == (count,)]
    if sizes not in ([], [_SIZED.get(op.base)]) or (rule.shape_args and not sizes):
        return frozenset()
    if not any(has(dims, factor) for dims in rule.results):
        return frozenset()
    tensors = zip((*op.inputs, *op.results), (*rule.operands, *rule.results), strict=True)
    return frozenset(v for v, dims in tensors if has(dims, factor))


@dataclass(slots=True)
class _Dispatcher:
    """Writes dispatches before and combines after the ops `inside`, which are given by their ids.

    Attributes:
        experts: how many there are, by ids.
        there: (value, ids) -> the same rows where their experts are.
        known: ids -> the experts of the rows that are there.
    """

    program: Program
    inside: Mapping[int, int]
    experts: Mapping[int, int]
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    there: dict[tuple[int, int], int] = field(default_factory=dict)
    known: dict[int, int] = field(default_factory=dict)

    def run(self) -> Program:
        """The program."""
        self.values += self.program.values
        readers: dict[int, set[int | None]] = {v: {None} for _, v in self.program.outputs}
        for number, op in enumerate(self.program.ops):
            for value in op.inputs:
                readers.setdefault(value, set()).add(self.inside.get(number))
        for number, op in enumerate(self.program.ops):
            if number in self.inside:
                self.move(op, self.inside[number], readers)
            else:
                self.ops.append(op)
        return replace(self.program, values=tuple(self.values), ops=tuple(self.ops))

    def move(self, op: Op, ids: int, readers: Mapping[int, set[int | None]]) -> None:
        """An op on rows where their experts are; back where others read what it makes."""
        experts, rows = self.experts[ids], self.rows(op, ids)
        for value in op.inputs:
            if value in rows and (value, ids) not in self.there:
                dispatch = (Ref(value), Ref(ids), experts)
                self.ops.append(
                    _like(op, f"{_DISPATCH}.default", dispatch, (self.new(value, ids),))
                )
        there = {v: self.there[v, ids] for v in op.inputs if v in rows}
        if op.base in _ROWS:
            there[ids] = self.told(ids, op)
        args, kwargs = map_refs((op.args, op.kwargs), lambda v: there.get(v, v))
        if op.base in _ROWS:
            args = (*args[:-1], True)
        outputs = tuple(self.new(v, ids) if v in rows else v for v in op.outputs)
        self.ops.append(replace(op, args=args, kwargs=kwargs, outputs=outputs))
        for value in op.results:
            if value in rows and readers.get(value, set()) - {ids}:
                back = (Ref(self.there[value, ids]), Ref(ids), experts)
                self.ops.append(_like(op, f"{_COMBINE}.default", back, (value,)))

    def rows(self, op: Op, ids: int) -> frozenset[int]:
        """The operands and results that are rows."""
        if op.base in _ROWS:
            read = {op.inputs[place] for place in _ROWS[op.base]}
            return frozenset(read | set(op.results if op.base == _MM else ()))
        rule = rule_of(op, self.program.values)
        value = next(v for v in (*op.inputs, *op.results) if (v, ids) in self.there)
        return _rows_of(op, rule, value, self.program)

    def told(self, ids: int, op: Op) -> int:
        """The experts of the rows that are there."""
        if ids not in self.known:
            self.values.append(self.program.values[ids])
            self.known[ids] = len(self.values) - 1
            args = (Ref(ids), self.experts[ids])
            self.ops.append(_like(op, f"{_IDS}.default", args, (self.known[ids],)))
        return self.known[ids]

    def new(self, value: int | None, ids: int) -> int:
        """A value like another, which it is where its experts are."""
        assert value is not None
        self.values.append(self.program.values[value])
        self.there[value, ids] = len(self.values) - 1
        return self.there[value, ids]


def _like(op: Op, name: str, args: tuple[Arg, ...], outputs: tuple[int, ...]) -> Op:
    """An op that is there because of another."""
    return replace(op, name=name, args=args, kwargs=(), outputs=outputs, packed=False)


def routed(local: Local, axes: Sequence[Axis]) -> Local:
    """A rank's program with what its dispatches are made of; where nothing is split, nothing."""
    if not any(op.base in (_DISPATCH, _COMBINE, _IDS) for op in local.program.ops):
        return local
    router = _Router(local, next(axis.size for axis in axes if axis.name == AXIS))
    for op in local.program.ops:
        router.op(op)
    outputs = tuple((name, router.renamed.get(v, v)) for name, v in local.program.outputs)
    values, ops = tuple(router.values), tuple(router.ops)
    program = Program(values, local.program.inputs, ops, outputs)
    return Local(program, tuple(router.origin))


@dataclass(frozen=True, slots=True)
class _Route:
    """Where a layer's rows go: values of a rank's program.

    Attributes:
        order, inverse: rows by expert, and back.
        sent, received: rows for each rank, and from each.
        counts: rows from each rank, for each expert that is here.
    """

    order: int
    inverse: int
    sent: int
    received: int
    counts: int


NOWHERE = -1
"""In place of a global value: what only this rank has."""


class _Router:
    """Writes a rank's dispatches and combines as exchanges."""

    def __init__(self, local: Local, members: int) -> None:
        self.local = local
        self.members = members
        self.values = list(local.program.values)
        self.origin = list(local.origin)
        self.ops: list[Op] = []
        self.renamed: dict[int, int] = {}
        self.routes: dict[int, _Route] = {}
        self.ragged: set[int] = set()

    def op(self, op: Op) -> None:
        """Write one op."""
        args, kwargs = map_refs((op.args, op.kwargs), lambda v: self.renamed.get(v, v))
        op = replace(op, args=args, kwargs=kwargs)
        if op.base not in (_DISPATCH, _COMBINE, _IDS):
            self.check(op)
            self.ops.append(self.sized(op))
            return
        (result,), experts = op.results, op.args[-1]
        rows, ids = op.inputs[0], op.inputs[-1]
        assert isinstance(experts, int)
        if not isinstance(self.origin[ids][1].on(AXIS), Shard):
            self.renamed[result] = rows
            return
        route = self.route(ids, experts, op)
        if op.base == _IDS:
            self.write("meshwright.expert_ids.default", (Ref(route.counts),), result, op)
            self.outside(result)
        elif op.base == _DISPATCH:
            sorted_ = self.write(_PICK, (Ref(rows), 0, Ref(route.order)), self.new(rows), op)
            self.exchange(sorted_, route.sent, route.received, result, op)
            self.outside(result)
        else:
            back = self.exchange(rows, route.received, route.sent, self.new(result), op)
            self.write(_PICK, (Ref(back), 0, Ref(route.inverse)), result, op)

    def check(self, op: Op) -> None:
        """What reads rows that are here has as many; no other collective may cut or join them."""
        if not self.ragged.intersection(op.inputs):
            return
        if op.name.startswith("comm.") and any(
            isinstance(arg, tuple) and arg[0] == 0 for arg in op.args
        ):
            raise InternalError(f"{op.name} of rows that were dispatched, {op.module} {op.source}")
        if op.base != _WEIGHT:
            for value in op.results:
                self.outside(value)

    def sized(self, op: Op) -> Op:
        """The op, with as many rows as come for what its size says."""
        place = _SIZED.get(op.base)
        size = None if place is None else op.args[place]
        if place is None or not isinstance(size, tuple) or op.inputs[0] not in self.ragged:
            return op
        size = (Symbol("rows", "first operand"), *size[1:])
        return replace(op, args=(*op.args[:place], size, *op.args[place + 1 :]))

    def outside(self, value: int) -> None:
        """A value is of no global one, and has as many rows as came."""
        self.ragged.add(value)
        self.origin[value] = (NOWHERE, REPLICATED)

    def new(self, like: int) -> int:
        """A value like another."""
        self.values.append(self.values[like])
        self.origin.append((NOWHERE, REPLICATED))
        return len(self.values) - 1

    def made(self, dtype: str, shape: tuple[int, ...]) -> int:
        """A value of this form."""
        self.values.append(Value(dtype, shape))
        self.origin.append((NOWHERE, REPLICATED))
        return len(self.values) - 1

    def write(self, name: str, args: tuple[Arg, ...], result: int, op: Op) -> int:
        """An op of one result."""
        self.ops.append(_like(op, name, args, (result,)))
        return result

    def exchange(self, rows: int, sent: int, received: int, result: int, op: Op) -> int:
        """Rows to their ranks: so many for each, so many from each."""
        args = (Ref(rows), AXIS, Ref(sent), Ref(received))
        made = self.write("comm.exchange", args, result, op)
        width = math.prod(self.values[rows].shape[1:])
        there, here = "rows with their samples", "rows with their experts"
        if op.base == _DISPATCH:
            self.note(there, here, "rows", width)
        else:
            self.note(here, there, "rows", width)
        return made

    def note(self, before: str, after: str, value: str, load: int) -> None:
        """Say why the last op is there; `load` is alike on all ranks, whatever rows they have."""
        notes = (("before", before), ("after", after), ("value", value), ("load", load))
        self.ops[-1] = replace(self.ops[-1], kwargs=notes)

    def route(self, ids: int, experts: int, op: Op) -> _Route:
        """Where the rows of these ids go; asked once."""
        if ids in self.routes:
            return self.routes[ids]
        members, (rows,) = self.members, self.values[ids].shape
        starts, shares = zip(*(chunk(experts, members, k) for k in range(members)), strict=True)
        order, inverse = self.made("int64", (rows,)), self.made("int64", (rows,))
        counts, sent = self.made("int64", (1, experts)), self.made("int64", (members,))
        outputs = (order, inverse, counts, sent)
        made = _like(op, "meshwright.expert_order.default", (Ref(ids), experts, shares), ())
        self.ops.append(replace(made, outputs=outputs, packed=True))
        got = self.made("int64", (members, max(shares)))
        each = (0, 1, 1, tuple(range(members)), (1,) * members)
        args: tuple[Arg, ...] = (Ref(counts), AXIS, each, (1, 1, 1, starts, shares))
        self.write("comm.all_to_all", args, got, op)
        self.note(
            f"sharded(0) over {AXIS}", f"sharded(1) over {AXIS}", "rows of each expert", experts
        )
        received = self.made("int64", (members,))
        self.write("aten.sum.dim_IntList", (Ref(got), (1,)), received, op)
        self.routes[ids] = _Route(order, inverse, sent, received, got)
        return self.routes[ids]


_PICK = "aten.index_select.default"
