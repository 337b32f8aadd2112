"""Mixtures of experts: rows that were sorted by expert are left where they are.

Models sort all tokens' rows by the expert that each was sent to, multiply groups of rows, and undo
the sort: a permutation of all tokens, which would be gathered over every axis that splits samples.
Here a row keeps its place, and `expert_mm(x (s i), ids (s), w (e i o)) -> (s o)` multiplies each by
the weights of its own expert; pointwise ops between carry the rows, so that tokens split freely.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.program.permuted import FORMS, Form, Rows
from meshwright.program.program import Arg, Op, Program, Ref, Value, map_refs, without_dead_ops
from meshwright.program.rules import Rule, rule_of

__all__ = ["has", "row_factor", "unsorted_experts"]

_GROUPED = frozenset(
    {"aten._grouped_mm", "meshwright.grouped_mm", "transformers.grouped_mm_fallback"}
)
_GROUPED_BACKWARD = "transformers.grouped_mm_fallback_backward"
_MM = "meshwright.expert_mm"


def unsorted_experts(program: Program) -> Program:
    """The program whose experts' rows keep their places; as it was where some could not."""
    if not any(op.base in _GROUPED for op in program.ops):
        return program
    rows = Rows(list(program.values))
    for op in program.ops:
        _write(rows, op)
    outputs = tuple((name, rows.renamed.get(v, v)) for name, v in program.outputs)
    made = Program(tuple(rows.values), program.inputs, tuple(rows.ops), outputs)
    made = without_dead_ops(made)
    left = any(op.base in _GROUPED or op.base == _GROUPED_BACKWARD for op in made.ops)
    return program if left else made


def _write(w: Rows, op: Op) -> None:
    """Write one op; what it makes of sorted rows, beside it or in its place."""
    args, kwargs = map_refs((op.args, op.kwargs), lambda v: w.renamed.get(v, v))
    op = replace(op, args=args, kwargs=kwargs)
    w.made.update(dict.fromkeys(op.results, op))
    if not any(form(w, op) for form in (*FORMS, *_FORMS)):
        w.ops.append(op)


def _multiplies(w: Rows, op: Op) -> bool:
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
        w.write(f"{_MM}_weight.default", args, w.values[result], op, result)
        return True
    w.ops.append(op)
    made = w.write(f"{_MM}.default", (Ref(left[1]), ids, Ref(y), False), w.values[result], op)
    w.rows[result] = (order, made)
    return True


def _multiplies_back(w: Rows, op: Op) -> bool:
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
        w.rows[of_rows] = (order, w.write(f"{_MM}.default", args, w.values[of_rows], op))
    if of_weight is not None:
        args = (Ref(rows), Ref(slope), ids, w.offsets[offsets][1], False)
        made = w.write(f"{_MM}_weight.default", args, w.values[of_weight], op)
        w.renamed[of_weight] = made
    return True


def _turns(w: Rows, op: Op) -> bool:
    """Two-dim sorted rows, transposed."""
    if op.base not in ("aten.t", "aten.transpose") or op.inputs[0] not in w.rows:
        return False
    if len(w.values[op.inputs[0]].shape) != 2:
        return False
    w.turned[op.results[0]] = op.inputs[0]
    w.ops.append(op)
    return True


def _carries(w: Rows, op: Op) -> bool:
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
    if factor in {*dict(rule.halos), rule.ring} or (
        rule.window is not None and rule.window[0] == factor
    ):
        return None  # where a row lies counts
    ahead = all(dims[0] == (factor,) for _, dims in tensors if has(dims, factor))
    kept = {has(dims, factor) for dims in rule.results}
    return factor if ahead and len(kept) == 1 else None


def has(dims: tuple[tuple[int, ...], ...], factor: int) -> bool:
    """Whether a tensor of these dims has the factor."""
    return any(factor in dim for dim in dims)


def _alike(w: Rows, op: Op, rule: Rule, factor: int) -> bool:
    """Whether what is sorted has these rows, and what is not has none, or has all rows alike."""
    return all(
        has(dims, factor) == (v in w.rows) or w.constant(v)
        for v, dims in zip(op.inputs, rule.operands, strict=True)
    )


_FORMS: tuple[Form, ...] = (_multiplies, _multiplies_back, _turns, _carries)
