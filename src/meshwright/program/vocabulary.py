"""Losses over a split vocabulary: logits are never gathered.

Log-softmax and the negative log likelihood of a class become ops whose every dim may be split: of
the classes only a maximum and two sums per token travel (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meshwright.program.program import Arg, Program, Ref, Value
from meshwright.program.writer import Writer

__all__ = ["split_losses"]

_MEAN = 1
"""aten's number for `reduction="mean"`."""


def split_losses(program: Program) -> Program:
    """The program with its log-softmaxes and likelihoods written out."""
    values, ops = list(program.values), []
    for op in program.ops:
        writer = Writer(values, op)
        maker = _FORMS.get(op.base)
        if maker is None or not maker(writer):
            ops.append(op)
        else:
            ops += writer.ops
    return replace(program, values=tuple(values), ops=tuple(ops))


def _hits(w: Writer, target: Arg, tokens: int, classes: int) -> Ref:
    """(tokens, classes): whether a class is a token's."""
    rows = w.write("aten.unsqueeze.default", (target, 1), Value("int64", (tokens, 1)))
    return w.write("aten.eq.Tensor", (rows, w.arange(classes)), Value("bool", (tokens, classes)))


def _log_softmax(w: Writer) -> bool:
    x, dim, widens = w.op.args[0], w.op.args[1], w.op.args[2]
    value = w.value(0)
    if widens is True or not value.shape:
        return False
    assert isinstance(dim, int)
    dim %= len(value.shape)
    kept = Value(value.dtype, (*value.shape[:dim], 1, *value.shape[dim + 1 :]))
    largest = w.write("aten.amax.default", (x, (dim,), True), kept)
    shifted = w.write("aten.sub.Tensor", (x, largest), value)
    total = w.write(
        "aten.sum.dim_IntList", (w.write("aten.exp.default", (shifted,), value), (dim,), True), kept
    )
    log = w.write("aten.log.default", (total,), kept)
    w.write("aten.sub.Tensor", (shifted, log), value, w.op.results[0])
    return True


def _log_softmax_backward(w: Writer) -> bool:
    """gradient - softmax x sum of gradients."""
    gradient, out, dim = w.op.args[:3]
    value = w.value(1)
    if w.value(0).dtype != value.dtype or not value.shape:
        return False
    assert isinstance(dim, int)
    dim %= len(value.shape)
    kept = Value(value.dtype, (*value.shape[:dim], 1, *value.shape[dim + 1 :]))
    total = w.write("aten.sum.dim_IntList", (gradient, (dim,), True), kept)
    soft = w.write("aten.exp.default", (out,), value)
    taken = w.write("aten.mul.Tensor", (soft, total), value)
    w.write("aten.sub.Tensor", (gradient, taken), value, w.op.results[0])
    return True


def _simple(w: Writer, x: int, weight: int, reduction: int) -> bool:
    """Rows of classes without class weights, not averaged."""
    plain = len(w.value(x).shape) == 2 and w.op.args[weight] is None
    return plain and w.op.args[reduction] != _MEAN


def _likelihood(w: Writer) -> bool:
    """nll_loss_forward(x, target, weight, reduction, ignored) -> (loss, total weight)."""
    if not _simple(w, 0, 2, 3):
        return False
    x, target, _, reduction, ignored = w.op.args
    tokens, classes = w.value(0).shape
    kind, row = w.value(0).dtype, w.value(1)
    checked = w.write("meshwright.classes.default", (target, classes, ignored), row)
    valid = w.write("aten.ne.Scalar", (checked, ignored), Value("bool", (tokens,)))
    zero = w.full(0.0, kind)
    hits = _hits(w, checked, tokens, classes)
    own = w.write("aten.where.self", (hits, x, zero), w.value(0))
    picked = w.write("aten.sum.dim_IntList", (own, (1,), False), Value(kind, (tokens,)))
    kept = w.write("aten.where.self", (valid, picked, zero), Value(kind, (tokens,)))
    loss, weight = w.op.outputs
    if loss is not None and reduction == 0:
        w.write("aten.neg.default", (kept,), Value(kind, (tokens,)), loss)
    elif loss is not None:
        total = w.write("aten.sum.dim_IntList", (kept, (0,), False), Value(kind, ()))
        w.write("aten.neg.default", (total,), Value(kind, ()), loss)
    if weight is not None:
        counted = w.write(
            "aten.where.self", (valid, w.full(1.0, kind), zero), Value(kind, (tokens,))
        )
        w.write("aten.sum.dim_IntList", (counted, (0,), False), Value(kind, ()), weight)
    return True


def _likelihood_backward(w: Writer) -> bool:
    """nll_loss_backward(gradient, x, target, weight, reduction, ignored, total) -> dx."""
    if not _simple(w, 1, 3, 4):
        return False
    gradient, _, target, _, reduction, ignored, _ = w.op.args
    tokens, classes = w.value(1).shape
    kind = w.value(1).dtype
    column = Value(kind, (tokens, 1) if reduction == 0 else ())
    if reduction == 0:
        gradient = w.write("aten.unsqueeze.default", (gradient, 1), column)
    down = w.write("aten.neg.default", (gradient,), column)
    zero = w.full(0.0, kind)
    valid = w.write("aten.ne.Scalar", (target, ignored), Value("bool", (tokens,)))
    rows = w.write("aten.unsqueeze.default", (valid, 1), Value("bool", (tokens, 1)))
    each = w.write("aten.where.self", (rows, down, zero), Value(kind, (tokens, 1)))
    hits = _hits(w, target, tokens, classes)
    w.write("aten.where.self", (hits, each, zero), w.value(1), w.op.results[0])
    return True


_FORMS: dict[str, Callable[[Writer], bool]] = {
    "aten._log_softmax": _log_softmax,
    "aten._log_softmax_backward_data": _log_softmax_backward,
    "aten.nll_loss_forward": _likelihood,
    "aten.nll_loss_backward": _likelihood_backward,
}
