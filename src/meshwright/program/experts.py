"""Mixtures of experts: rows that were sorted by expert are left where they are.

Models sort all tokens' rows by the expert that each was sent to, multiply groups of rows, and undo
the sort: a permutation of all tokens, which would be gathered over every axis that splits samples.
Here a row keeps its place, and `expert_mm(x (s i), ids (s), w (e i o)) -> (s o)` multiplies each by
the weights of its own expert; pointwise ops between carry the rows, so that tokens split freely.

Known by what ops do, whoever wrote them: `p` is the permutation that sorts ids; a value v is
*sorted* where v = u[p] for rows u that can be had unsorted. Gathers by p begin such values, ops
that treat rows alike carry them on, and what puts rows back (a gather by p's inverse, a scatter by
p) ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from meshwright.program.program import Arg, Op, Program, Ref, Symbol, Value, map_refs
from meshwright.program.program import without_dead_ops
from meshwright.program.rules import Rule, rule_of

__all__ = ["has", "row_factor", "unsorted_experts"]

_GROUPED = frozenset(
    {"aten._grouped_mm", "meshwright.grouped_mm", "transformers.grouped_mm_fallback"}
)
_GROUPED_BACKWARD = "transformers.grouped_mm_fallback_backward"
_PICKS = frozenset({"aten.index", "aten._unsafe_index", "aten.index_select"})
_PUTS = frozenset({"aten.index_put", "aten._unsafe_index_put", "aten.index_add"})
_COUNTS = frozenset({"aten.histc", "aten.bincount"})


def unsorted_experts(program: Program) -> Program:
    """The program whose experts' rows keep their places; as it was where some could not."""
    if not any(op.base in _GROUPED for op in program.ops):
        return program
    writer = _Writer(program, list(program.values))
    for op in program.ops:
        writer.op(op)
    outputs = tuple((name, writer.renamed.get(v, v)) for name, v in program.outputs)
    made = Program(tuple(writer.values), program.inputs, tuple(writer.ops), outputs)
    made = without_dead_ops(made)
    left = any(op.base in _GROUPED or op.base == _GROUPED_BACKWARD for op in made.ops)
    return program if left else made


@dataclass(slots=True)
class _Writer:
    """Writes the unsorted program, op by op.

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

    program: Program
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

    def op(self, op: Op) -> None:
        """Write one op; what it makes of sorted rows, beside it or in its place."""
        args, kwargs = map_refs((op.args, op.kwargs), lambda v: self.renamed.get(v, v))
        op = replace(op, args=args, kwargs=kwargs)
        self.made.update(dict.fromkeys(op.results, op))
        for form in _FORMS:
            if form(self, op):
                return
        self.ops.append(op)

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


def _sorts(w: _Writer, op: Op) -> bool:
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


def _divides(w: _Writer, op: Op) -> bool:
    """p // k: the token whose row it is."""
    floors = dict(op.kwargs).get("rounding_mode") == "floor"
    if op.base != "aten.floor_divide" and not (op.base == "aten.div" and floors):
        return False
    if not op.inputs or op.inputs[0] not in w.ids or not isinstance(op.args[1], int):
        return False
    w.ops.append(op)
    w.token[op.results[0]] = (op.inputs[0], op.args[1])
    return True


def _counting(w: _Writer, op: Op) -> bool:
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


def _inverts(w: _Writer, op: Op) -> bool:
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


def _picks(w: _Writer, op: Op) -> bool:
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


def _repeated(w: _Writer, op: Op, source: int, times: int) -> int:
    """Each row `times` times in a row."""
    dtype, (tokens, *rest) = w.values[source].dtype, w.values[source].shape
    one = Value(dtype, (tokens, 1, *rest))
    each = Value(dtype, (tokens, times, *rest))
    lifted = w.write("aten.unsqueeze.default", (Ref(source), 1), one, op)
    spread = w.write("aten.expand.default", (Ref(lifted), each.shape), each, op)
    flat = Value(dtype, (tokens * times, *rest))
    return w.write("aten.reshape.default", (Ref(spread), flat.shape), flat, op)


def _puts(w: _Writer, op: Op) -> bool:
    """Scatters of zeros: by p or p // k sorted rows are rows again; by p's inverse they begin."""
    index = w.index(op) if op.base in _PUTS else None
    place = 3 if op.base == "aten.index_add" else 2
    if index is None or not isinstance(op.args[0], Ref) or not isinstance(op.args[place], Ref):
        return False
    source, result = op.args[place].index, op.results[0]  # type: ignore[union-attr]
    zero = w.zero(op.args[0].index)
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


def _same_rows(w: _Writer, source: int, index: int) -> bool:
    return w.values[source].shape[:1] == w.values[index].shape


def _adds(op: Op) -> bool:
    """Whether a scatter adds up what comes to one place."""
    if op.base == "aten.index_add":
        return not op.kwargs
    return dict(op.kwargs).get("accumulate", op.args[3] if len(op.args) > 3 else False) is True


def _summed(w: _Writer, op: Op, rows: int, times: int) -> bool:
    """Each token's `times` rows added up."""
    dtype, shape = w.values[rows].dtype, w.values[rows].shape
    tokens, result = shape[0] // times, op.results[0]
    if w.values[result].shape != (tokens, *shape[1:]):
        return False
    each = Value(dtype, (tokens, times, *shape[1:]))
    seen = w.write("aten.reshape.default", (Ref(rows), each.shape), each, op)
    w.write("aten.sum.dim_IntList", (Ref(seen), (1,)), w.values[result], op, result)
    return True


def _multiplies(w: _Writer, op: Op) -> bool:
    """grouped_mm(sorted rows, weights, offsets), and of two sorted values the weights' gradient."""
    if op.base not in _GROUPED or len(op.inputs) != 3:
        return False
    x, y, offsets = op.inputs
    result = op.results[0]
    left, right = w.rows.get(w.turned.get(x, x)), w.rows.get(y)
    if left is None or offsets not in w.offsets or w.offsets[offsets][0] != left[0]:
        return False
    order, experts = w.offsets[offsets]
    ids = Ref(w.ids[order])
    if x in w.turned:
        if right is None or right[0] != order:
            return False
        args: tuple[Arg, ...] = (Ref(left[1]), Ref(right[1]), ids, experts, False)
        w.write("meshwright.expert_mm_weight.default", args, w.values[result], op, result)
        return True
    w.ops.append(op)
    made = w.write(_MM, (Ref(left[1]), ids, Ref(y), False), w.values[result], op)
    w.rows[result] = (order, made)
    return True


_MM = "meshwright.expert_mm.default"


def _multiplies_back(w: _Writer, op: Op) -> bool:
    """grouped_mm's backward(rows, weights, offsets, gradient) -> (of rows, of weights)."""
    if op.base != _GROUPED_BACKWARD or len(op.inputs) != 4:
        return False
    x, weight, offsets, gradient = op.inputs
    if x not in w.rows or gradient not in w.rows or offsets not in w.offsets:
        return False
    (order, rows), (other, slope) = w.rows[x], w.rows[gradient]
    if not order == other == w.offsets[offsets][0]:
        return False
    ids, (of_rows, of_weight) = Ref(w.ids[order]), op.outputs
    w.ops.append(op)
    if of_rows is not None:
        dtype, (e, i, o) = w.values[weight].dtype, w.values[weight].shape
        args: tuple[Arg, ...] = (Ref(weight), 1, 2)
        turned = w.write("aten.transpose.int", args, Value(dtype, (e, o, i)), op)
        args = (Ref(slope), ids, Ref(turned), False)
        w.rows[of_rows] = (order, w.write(_MM, args, w.values[of_rows], op))
    if of_weight is not None:
        args = (Ref(rows), Ref(slope), ids, w.offsets[offsets][1], False)
        made = w.write("meshwright.expert_mm_weight.default", args, w.values[of_weight], op)
        w.renamed[of_weight] = made
    return True


def _turns(w: _Writer, op: Op) -> bool:
    """Two-dim sorted rows, transposed."""
    if op.base not in ("aten.t", "aten.transpose") or op.inputs[0] not in w.rows:
        return False
    if len(w.values[op.inputs[0]].shape) != 2:
        return False
    w.turned[op.results[0]] = op.inputs[0]
    w.ops.append(op)
    return True


def _carries(w: _Writer, op: Op) -> bool:
    """Any op that treats rows alike: done unsorted beside it."""
    sorted_ = [v for v in op.inputs if v in w.rows]
    if not sorted_ or op.base == "meshwright.draw" or len({w.rows[v][0] for v in sorted_}) > 1:
        return False
    rule = rule_of(op, w.values)
    factor = row_factor(op, rule, sorted_[0])
    if factor is None or not _alike(w, op, rule, factor):
        return False
    args, kwargs = map_refs((op.args, op.kwargs), lambda v: w.rows[v][1] if v in w.rows else v)
    if not any(has(dims, factor) for dims in rule.results):  # a sum over rows, in any order
        w.ops.append(replace(op, args=args, kwargs=kwargs))
        return True
    outputs: list[int | None] = []
    for value in op.outputs:
        outputs.append(None if value is None else len(w.values))
        if value is not None:
            w.values.append(w.values[value])
    w.ops += [op, replace(op, args=args, kwargs=kwargs, outputs=tuple(outputs))]
    order = w.rows[sorted_[0]][0]
    pairs = zip(op.outputs, outputs, strict=True)
    w.rows.update({v: (order, new) for v, new in pairs if v is not None and new is not None})
    return True


def row_factor(op: Op, rule: Rule, value: int) -> int | None:
    """The factor that dim 0 of an operand or result is; None if the op does not treat rows alike.

    It does where each tensor that has the factor has it for its dim 0, and all results have it, or
    none.
    """
    tensors = list(zip((*op.inputs, *op.results), (*rule.operands, *rule.results), strict=True))
    first = next((dims[:1] for v, dims in tensors if v == value), ())
    if not rule.known or len(first) != 1 or len(first[0]) != 1 or first[0][0] in rule.whole:
        return None
    factor = first[0][0]
    ahead = all(dims[0] == (factor,) for _, dims in tensors if has(dims, factor))
    kept = {has(dims, factor) for dims in rule.results}
    return factor if ahead and len(kept) == 1 else None


def has(dims: tuple[tuple[int, ...], ...], factor: int) -> bool:
    """Whether a tensor of these dims has the factor."""
    return any(factor in dim for dim in dims)


def _alike(w: _Writer, op: Op, rule: Rule, factor: int) -> bool:
    """Whether what is sorted has these rows, and what is not has none, or has all rows alike."""
    return all(
        has(dims, factor) == (v in w.rows) or w.constant(v)
        for v, dims in zip(op.inputs, rule.operands, strict=True)
    )


_FORMS: tuple[Callable[[_Writer, Op], bool], ...] = (
    _sorts,
    _divides,
    _counting,
    _inverts,
    _picks,
    _puts,
    _multiplies,
    _multiplies_back,
    _turns,
    _carries,
)
