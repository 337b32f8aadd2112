"""Permutations of rows, followed through a program: where they begin, are inverted, and end.

`p` is the permutation that sorts some ids; a value v is *sorted* where v = u[p] for rows u that can
be had unsorted. Gathers by p begin such values; a gather by p's inverse, or a scatter by p, puts
rows back. Forms are recognised by what ops do, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from meshwright.program.program import Arg, Op, Ref, Value, map_refs

__all__ = ["FORMS", "Form", "Rows"]

_PICKS = frozenset({"aten.index", "aten._unsafe_index", "aten.index_select"})
_PUTS = frozenset({"aten.index_put", "aten._unsafe_index_put", "aten.index_add"})
_COUNTS = frozenset({"aten.histc", "aten.bincount"})


@dataclass(slots=True)
class Rows:
    """What is known of a program's rows, and what is written in its place.

    Attributes:
        renamed: value -> the one that takes its place.
        ids: permutation -> the ids that it sorts.
        permutation: ids, sorted or not, and casts of them -> the permutation that sorts them.
        token: p // k -> (p, k): which of a token's k rows does not count.
        inverse: the inverse of a permutation -> the permutation.
        counts, offsets: rows of each expert, and where each expert's end -> (permutation, experts).
        rows: sorted value -> (permutation, the same rows unsorted).
        turned: transposed -> the sorted value.
        made: value -> the op that makes it.
    """

    values: list[Value]
    ops: list[Op] = field(default_factory=list)
    renamed: dict[int, int] = field(default_factory=dict)
    ids: dict[int, int] = field(default_factory=dict)
    permutation: dict[int, int] = field(default_factory=dict)
    token: dict[int, tuple[int, int]] = field(default_factory=dict)
    inverse: dict[int, int] = field(default_factory=dict)
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)
    offsets: dict[int, tuple[int, int]] = field(default_factory=dict)
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    turned: dict[int, int] = field(default_factory=dict)
    made: dict[int, Op] = field(default_factory=dict)

    def write(
        self, name: str, args: tuple[Arg, ...], like: Value, op: Op, result: int | None = None
    ) -> int:
        """One op in the place of `op`; the value it makes."""
        if result is None:
            result = len(self.values)
            self.values.append(like)
        new = replace(op, name=name, args=args, kwargs=(), outputs=(result,), packed=False)
        self.ops.append(new)
        return result

    def zero(self, value: int) -> bool:
        """Whether a value is nothing but zeros."""
        op = self.made.get(value)
        if op is None:
            return False
        if op.base in ("aten.full", "aten.new_full"):
            return op.args[-1] in (0, 0.0, False)
        return op.base in ("aten.zeros", "aten.new_zeros")

    def constant(self, value: int) -> bool:
        """Whether a value is one number everywhere, so that its rows have no order."""
        op = self.made.get(value)
        return op is not None and op.base in ("aten.full", "aten.zeros", "aten.ones")

    def index(self, op: Op) -> int | None:
        """The one index of a gather or scatter of dim 0; None if it is of another kind."""
        place = 2 if op.base in ("aten.index_select", "aten.index_add") else 1
        found = op.args[place]
        if place == 2 and op.args[1] != 0:
            return None
        if isinstance(found, tuple):
            if len(found) != 1:
                return None
            found = found[0]
        return found.index if isinstance(found, Ref) else None


def _sorts(w: Rows, op: Op) -> bool:
    """sort(ids) -> (sorted ids, permutation); of a permutation: its inverse."""
    if op.base != "aten.sort" or len(op.inputs) != 1 or len(op.outputs) != 2:
        return False
    (value,) = op.inputs
    known = w.values[value]
    kwargs = dict(op.kwargs)
    descends = kwargs.get("descending", op.args[2] if len(op.args) > 2 else False)
    sorted_, order = op.outputs
    if len(known.shape) != 1 or "int" not in known.dtype or descends or order is None:
        return False
    w.ops.append(op)
    if value in w.ids:
        w.inverse[order] = value
        return True
    w.ids[order] = value
    w.permutation[value] = w.permutation.get(value, order)
    if sorted_ is not None:
        w.permutation[sorted_] = order
        w.rows[sorted_] = (order, value)
    return True


def _divides(w: Rows, op: Op) -> bool:
    """p // k: the token whose row it is."""
    floors = dict(op.kwargs).get("rounding_mode") == "floor"
    if op.base != "aten.floor_divide" and not (op.base == "aten.div" and floors):
        return False
    if not op.inputs or op.inputs[0] not in w.ids or not isinstance(op.args[1], int):
        return False
    w.ops.append(op)
    w.token[op.results[0]] = (op.inputs[0], op.args[1])
    return True


def _counting(w: Rows, op: Op) -> bool:
    """Counts of ids per expert, their running sum, and casts of these and of ids."""
    if not op.inputs or len(op.results) != 1:
        return False
    (value, *_), (result,) = op.inputs, op.results
    casts = op.base == "aten._to_copy"
    for known in (w.counts, w.offsets):
        if casts and value in known:
            known[result] = known[value]
            w.ops.append(op)
            return True
    if casts and value in w.permutation:
        w.permutation[result] = w.permutation[value]
        return False  # it carries rows too
    if op.base in _COUNTS and value in w.permutation:
        experts = w.values[result].shape[0]
        span = op.args[1:4]
        if op.base == "aten.histc" and span != (experts, 0, experts - 1):
            return False
        w.counts[result] = (w.permutation[value], experts)
    elif op.base == "aten.cumsum" and value in w.counts:
        w.offsets[result] = w.counts[value]
    else:
        return False
    w.ops.append(op)
    return True


def _inverts(w: Rows, op: Op) -> bool:
    """anything[p] = 0, 1, 2, ..: the inverse of p."""
    if op.base not in _PUTS or op.base == "aten.index_add" or w.index(op) not in w.ids:
        return False
    source = op.args[2]
    counted = w.made.get(source.index) if isinstance(source, Ref) else None
    order = w.index(op)
    size = w.values[op.results[0]].shape
    if counted is None or counted.base != "aten.arange" or order is None:
        return False
    if len(size) != 1 or counted.args not in ((size[0],), (0, size[0]), (0, size[0], 1)):
        return False
    w.ops.append(op)
    w.inverse[op.results[0]] = order
    return True


def _picks(w: Rows, op: Op) -> bool:
    """x[p] and x[p // k] begin sorted rows; sorted rows by p's inverse are rows again."""
    if op.base not in _PICKS or not isinstance(op.args[0], Ref):
        return False
    source, index, result = op.args[0].index, w.index(op), op.results[0]
    if index is None:
        return False
    value = w.values[source]
    if index in w.ids and value.shape[0] == w.values[index].shape[0]:
        w.rows[result] = (index, source)
    elif index in w.token:
        order, times = w.token[index]
        if value.shape[0] * times != w.values[order].shape[0]:
            return False
        w.rows[result] = (order, _repeated(w, op, source, times))
    elif index in w.inverse and w.rows.get(source, (None,))[0] == w.inverse[index]:
        w.renamed[result] = w.rows[source][1]
        return True
    else:
        return False
    w.ops.append(op)
    return True


def _repeated(w: Rows, op: Op, source: int, times: int) -> int:
    """Each row `times` times in a row."""
    dtype, (tokens, *rest) = w.values[source].dtype, w.values[source].shape
    one = Value(dtype, (tokens, 1, *rest))
    each = Value(dtype, (tokens, times, *rest))
    lifted = w.write("aten.unsqueeze.default", (Ref(source), 1), one, op)
    spread = w.write("aten.expand.default", (Ref(lifted), each.shape), each, op)
    flat = Value(dtype, (tokens * times, *rest))
    return w.write("aten.view.default", (Ref(spread), flat.shape), flat, op)


def _puts(w: Rows, op: Op) -> bool:
    """Scatters of zeros: by p or p // k sorted rows are rows again; by p's inverse they begin."""
    index = w.index(op) if op.base in _PUTS else None
    place = 3 if op.base == "aten.index_add" else 2
    if index is None:
        return False
    base, given, result = op.args[0], op.args[place], op.results[0]
    if not isinstance(base, Ref) or not isinstance(given, Ref):
        return False
    source, zero = given.index, w.zero(base.index)
    order, rows = w.rows.get(source, (None, source))
    if zero and index in w.inverse and source not in w.rows:
        w.rows[result] = (w.inverse[index], source)
        w.ops.append(op)
        return True
    if order is None or not _same_rows(w, source, index):
        return False
    if zero and index == order and w.values[source].shape == w.values[result].shape:
        w.renamed[result] = rows
        return True
    if zero and w.token.get(index, (None,))[0] == order and _adds(op):
        return _summed(w, op, rows, w.token[index][1])
    picked = w.rows.get(index)
    if picked is not None and picked[0] == order and _adds(op):
        changes = {source: rows, index: picked[1]}
        args = map_refs(op.args, lambda v: changes.get(v, v))
        w.ops.append(replace(op, args=args))
        return True
    return False


def _same_rows(w: Rows, source: int, index: int) -> bool:
    return w.values[source].shape[:1] == w.values[index].shape


def _adds(op: Op) -> bool:
    """Whether a scatter adds up what comes to one place."""
    if op.base == "aten.index_add":
        return not op.kwargs
    return dict(op.kwargs).get("accumulate", op.args[3] if len(op.args) > 3 else False) is True


def _summed(w: Rows, op: Op, rows: int, times: int) -> bool:
    """Each token's `times` rows added up."""
    dtype, shape = w.values[rows].dtype, w.values[rows].shape
    tokens, result = shape[0] // times, op.results[0]
    if w.values[result].shape != (tokens, *shape[1:]):
        return False
    each = Value(dtype, (tokens, times, *shape[1:]))
    seen = w.write("aten.view.default", (Ref(rows), each.shape), each, op)
    w.write("aten.sum.dim_IntList", (Ref(seen), (1,)), w.values[result], op, result)
    return True


Form = Callable[[Rows, Op], bool]
"""Writes an op, if it is of this form."""

FORMS: tuple[Form, ...] = (_sorts, _divides, _counting, _inverts, _picks, _puts)
"""In the order in which they are tried."""
