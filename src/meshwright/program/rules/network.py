"""Layers that stay one op: softmax, norms, attention, convolution, pooling, embedding, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.program.program import Arg, Ref, Value
from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum, whole

__all__ = ["RULES"]

_MEAN = 1
"""aten's number for `reduction="mean"`."""


def _if(arg: Arg, pattern: str) -> str | None:
    """The pattern where the optional operand is there."""
    return pattern if isinstance(arg, Ref) else None


def _made(view: OpView, *patterns: str) -> list[str]:
    """The patterns of the results that are used (an output mask leaves some out)."""
    outs = view.op.outputs
    return [p for p, out in zip(patterns, outs, strict=False) if out is not None]


def _letters(rank: int) -> list[str]:
    return [f"d{k}" for k in range(rank)]


def _softmax(view: OpView) -> Rule:
    """One dim is whole; softmax(x, dim, ..) and softmax_backward(grad, out, dim, ..)."""
    rank = len(view.operands[0].shape)
    if rank == 0:
        return whole(view)
    dim = view.number(len(view.operands)) % rank
    letters = _letters(rank)
    pattern = " ".join(letters)
    linear = [[0]] if len(view.operands) == 2 else []
    return einsum(view, [pattern] * len(view.operands), [pattern], keep=letters[dim], linear=linear)


def _norm_patterns(view: OpView, rank: int, place: int) -> tuple[str, str, str]:
    """(input, statistics, weight) patterns of a norm over the last dims of `normalized_shape`."""
    count = len(view.numbers(place) or ())
    letters = _letters(rank)
    lead, tail = letters[: rank - count], letters[rank - count :]
    return " ".join(letters), " ".join(lead + ["1"] * count), " ".join(tail)


def _layer_norm(view: OpView) -> Rule:
    full, stats, tail = _norm_patterns(view, len(view.operands[0].shape), 1)
    operands = [full, _if(view.arg(2), tail), _if(view.arg(3), tail)]
    return einsum(view, operands, _made(view, full, stats, stats), keep=tail)


def _layer_norm_backward(view: OpView) -> Rule:
    full, stats, tail = _norm_patterns(view, len(view.operands[0].shape), 2)
    operands = [full, full, stats, stats, _if(view.arg(5), tail), _if(view.arg(6), tail)]
    return einsum(view, operands, _made(view, full, tail, tail), keep=tail, linear=[[0]])


def _group_norm(view: OpView) -> Rule:
    """Samples pass; everything within a sample is whole."""
    rank = len(view.operands[0].shape)
    full = " ".join(["n", *["1"] * (rank - 1)])
    operands = [full, _if(view.arg(1), "1"), _if(view.arg(2), "1")]
    rule = einsum(view, operands, _made(view, full, "n 1", "n 1"))
    return replace(rule, count_args=((3, 0, 0),))


def _group_norm_backward(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    full = " ".join(["n", *["1"] * (rank - 1)])
    operands = [full, full, "n 1", "n 1", _if(view.arg(4), "1")]
    rule = einsum(view, operands, _made(view, full, "1", "1"))
    return replace(rule, count_args=((5, 0, 0),))


def _flash(view: OpView) -> Rule:
    """q (b h t d), k and v (b h s d) -> out (b h t d), logsumexp (b h t)."""
    mask = _mask(view)
    operands = ["b h t d", "b h s d", "b h s d", mask]
    return einsum(view, operands, _made(view, "b h t d", "b h t"), keep=_kept_heads(view, 0))


def _flash_backward(view: OpView) -> Rule:
    q, k = "b h t d", "b h s d"
    operands = [q, q, k, k, q, "b h t", _mask(view)]
    return einsum(view, operands, _made(view, q, k, k), keep=_kept_heads(view, 1))


def _mask(view: OpView) -> str | None:
    """The attention mask's dims: (t s), or (b h t s) where any may be 1."""
    if not isinstance(dict(view.op.kwargs).get("attn_mask"), Ref):
        return None
    return " ".join(("b", "h", "t", "s")[4 - len(view.operands[-1].shape) :])


def _kept_heads(view: OpView, query: int) -> str:
    """Letters that stay whole; heads too where several queries share a key (grouped attention).

    Queries may be split unless a flag says which keys each sees: their gradient to keys and values
    is a sum.
    """
    heads, shared = (view.operands[place].shape[1] for place in (query, query + 1))
    causal = view.arg(7 if query else 4) is True
    return "s d" + " t" * causal + " h" * (heads != shared)


def _samples_only(view: OpView) -> Rule:
    """Dim 0 of everything is the sample; the rest is whole (pooling, resizing and its backward)."""

    def pattern(rank: int) -> str:
        return " ".join(["n", *["1"] * (rank - 1)])

    if any(len(v.shape) != 4 for v in (*view.operands, *view.results)):
        return whole(view)
    resized = view.op.base.startswith("aten.upsample_") and view.op.base.endswith("_backward")
    size = [(2, 0)] if resized else []
    operands = [pattern(len(v.shape)) for v in view.operands]
    results = [pattern(len(v.shape)) for v in view.results]
    return einsum(view, operands, results, shape_args=size)


def _convolution(view: OpView) -> Rule:
    """x (n c ...), w (o c ...), bias (o): samples and, without groups, output channels."""
    space = ["1"] * (len(view.operands[0].shape) - 2)
    x, w = " ".join(["n", "1", *space]), " ".join(["o", "1", *space])
    out = " ".join(["n", "o", *space])
    keep = "" if view.number(8) == 1 else "o"
    if view.arg(6) is True:  # transposed: the weight is (c o ...)
        w = " ".join(["1", "o", *space])
    return einsum(view, [x, w, _if(view.arg(2), "o")], [out], keep=keep)


def _convolution_backward(view: OpView) -> Rule:
    """(grad, x, w) -> (dx, dw, db): the weight's gradients sum over samples."""
    space = ["1"] * (len(view.operands[0].shape) - 2)
    x, w = " ".join(["n", "1", *space]), " ".join(["1", "1", *space])
    return einsum(view, [x, x, w], _made(view, x, w, "1"))


def _embedding(view: OpView) -> Rule:
    """weight (v d), indices (...) -> (... d)."""
    index = [f"i{k}" for k in range(len(view.operands[1].shape))]
    out = " ".join([*index, "d"])
    rule = einsum(view, ["v d", " ".join(index)], [out], linear=[[0]])
    plain = len(view.op.args) < 4 or view.op.args[3] is False
    if not plain or not rule.operands[0][0]:
        return einsum(view, ["v d", " ".join(index)], [out], keep="v", linear=[[0]])
    return replace(rule, window=(rule.operands[0][0][0], "meshwright.embedding_window.default"))


def _embedding_backward(view: OpView) -> Rule:
    """grad (... d), indices (...) -> (v d): sums over the indices."""
    index = [f"i{k}" for k in range(len(view.operands[1].shape))]
    keep = " ".join(index) if view.arg(4) is True else ""  # divides by how often each index occurs
    operands = [" ".join([*index, "d"]), " ".join(index)]
    rule = einsum(view, operands, ["v d"], keep=keep, linear=[[0]])
    if keep or not rule.results[0][0]:
        return einsum(view, operands, ["1 d"], keep=keep, linear=[[0]])
    name = "meshwright.embedding_window_backward.default"
    return replace(rule, window=(rule.results[0][0][0], name), arguments=_rows)


def _rows(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
    """embedding_dense_backward(grad, indices, rows, ..): the rows that this rank has."""
    return (*args[:2], results[0].shape[0], *args[3:])


def _nll_forward(view: OpView) -> Rule:
    """x (n c), target (n) -> sum of losses, sum of weights; a mean divides by all its weights."""
    if len(view.operands[0].shape) != 2 or view.number(3) == _MEAN:
        return whole(view)
    out = "n" if view.number(3) == 0 else ""
    weight = _if(view.arg(2), "c")
    return einsum(view, ["n c", "n", weight], _made(view, out, ""), keep="c")


def _nll_backward(view: OpView) -> Rule:
    """(grad, x, target, weight, reduction, ignore, total) -> gradient of x."""
    if len(view.operands[1].shape) != 2 or view.number(4) == _MEAN:
        return whole(view)
    grad = "n" if view.number(4) == 0 else ""
    operands = [grad, "n c", "n", _if(view.arg(3), "c"), _if(view.arg(6), "")]
    return einsum(view, operands, ["n c"], keep="c", linear=[[0]])


def _gather(view: OpView) -> Rule:
    """x.gather(dim, index): the other dims pass where the index covers them whole."""
    x, index = view.operands[0].shape, view.operands[1].shape
    if not x or len(x) != len(index):
        return whole(view)
    dim = view.number(1) % len(x)
    letters = ["1" if k == dim or x[k] != index[k] else f"d{k}" for k in range(len(x))]
    pattern = " ".join(letters)
    return einsum(view, [pattern, pattern], [pattern], linear=[[0]])


def _scatter(view: OpView) -> Rule:
    """x.scatter(dim, index, source): as gather, reading and writing along `dim`."""
    shapes = [value.shape for value in view.operands]
    if not shapes[0] or len({len(shape) for shape in shapes}) != 1:
        return whole(view)
    dim = view.number(1) % len(shapes[0])
    same = [k != dim and len({shape[k] for shape in shapes}) == 1 for k in range(len(shapes[0]))]
    pattern = " ".join(f"d{k}" if ok else "1" for k, ok in enumerate(same))
    return einsum(view, [pattern] * len(shapes), [pattern])


def _scatter_add(view: OpView) -> Rule:
    """x.scatter_add(dim, index, source): what is added may come in parts."""
    shapes = [value.shape for value in view.operands]
    if not shapes[0] or len({len(shape) for shape in shapes}) != 1 or shapes[1] != shapes[2]:
        return whole(view)
    dim = view.number(1) % len(shapes[0])
    same = [k != dim and shapes[0][k] == shapes[1][k] for k in range(len(shapes[0]))]
    base = " ".join(f"d{k}" if ok else "1" for k, ok in enumerate(same))
    given = " ".join(f"d{k}" if ok or k == dim else "1" for k, ok in enumerate(same))
    return einsum(view, [base, given, given], [base], addends=[0], linear=[[0, 2]])


def _index(view: OpView) -> Rule:
    """x[i, j, ..]: dims that are not indexed pass; the indices' own dims pass, broadcast."""
    found = _picked(view, view.operands[1:])
    if found is None:
        return whole(view)
    x, indices, out = found
    return einsum(view, [x, *indices], [out], linear=[[0]])


def _index_put(view: OpView) -> Rule:
    """x.index_put((i, j, ..), values, accumulate): what is added over a split index is a term."""
    found = _picked(view, view.operands[1:-1])
    if found is None:
        return whole(view)
    x, indices, out = found
    adds = view.arg(3, default=False) is True
    put = out.split()
    places = [k for k, letter in enumerate(put) if letter.startswith("i")]
    values = " ".join(put[len(put) - len(view.operands[-1].shape) :])
    keep = "" if adds else " ".join(put[k] for k in places)
    last = len(view.operands) - 1
    operands = [x, *indices, values]
    addends = [0] if adds else []
    return einsum(view, operands, [x], keep=keep, addends=addends, linear=[[0, last]])


def _picked(view: OpView, indices: Sequence[Value]) -> tuple[str, list[str], str] | None:
    """Patterns of x, its indices and x[indices]; None for masks and indices that lie apart."""
    picks = view.arg(1)
    assert isinstance(picks, tuple)
    used = [k for k, pick in enumerate(picks) if isinstance(pick, Ref)]
    if any(value.dtype == "bool" for value in indices) or not used:
        return None
    if used != list(range(used[0], used[-1] + 1)):
        return None
    letters = ["1" if k in used else f"d{k}" for k in range(len(view.operands[0].shape))]
    rank = max(len(value.shape) for value in indices)
    index = [f"i{k}" for k in range(rank)]
    patterns = [" ".join(index[rank - len(value.shape) :]) for value in indices]
    out = letters[: used[0]] + index + letters[used[-1] + 1 :]
    return " ".join(letters), patterns, " ".join(out)


def _index_select(view: OpView) -> Rule:
    """x.index_select(dim, index): the other dims pass."""
    rank = len(view.operands[0].shape)
    letters = ["1" if k == view.number(1) % rank else f"d{k}" for k in range(rank)]
    pattern = " ".join(letters)
    return einsum(view, [pattern, "1"], [pattern], linear=[[0]])


def _index_add(view: OpView) -> Rule:
    """x.index_add(dim, index, source): the other dims pass."""
    rank = len(view.operands[0].shape)
    letters = ["1" if k == view.number(1) % rank else f"d{k}" for k in range(rank)]
    pattern = " ".join(letters)
    return einsum(view, [pattern, "1", pattern], [pattern], linear=[[0, 2]])


RULES: dict[str, RuleMaker] = {
    **dict.fromkeys(
        (
            "aten._softmax",
            "aten._log_softmax",
            "aten._safe_softmax",
            "aten._softmax_backward_data",
            "aten._log_softmax_backward_data",
        ),
        _softmax,
    ),
    "aten.native_layer_norm": _layer_norm,
    "aten.native_layer_norm_backward": _layer_norm_backward,
    "aten.native_group_norm": _group_norm,
    "aten.native_group_norm_backward": _group_norm_backward,
    "aten._scaled_dot_product_flash_attention_for_cpu": _flash,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    **dict.fromkeys(
        (
            "aten.max_pool2d_with_indices",
            "aten.max_pool2d_with_indices_backward",
            "aten.avg_pool2d",
            "aten.avg_pool2d_backward",
            "aten._adaptive_avg_pool2d",
            "aten._adaptive_avg_pool2d_backward",
            "aten.pixel_shuffle",
            "aten.pixel_unshuffle",
            "aten.upsample_nearest2d",
            "aten.upsample_nearest2d_backward",
            "aten.upsample_bilinear2d",
            "aten.upsample_bilinear2d_backward",
        ),
        _samples_only,
    ),
    "aten.convolution": _convolution,
    "aten.convolution_backward": _convolution_backward,
    "aten.embedding": _embedding,
    "aten.embedding_dense_backward": _embedding_backward,
    "aten.nll_loss_forward": _nll_forward,
    "aten.nll_loss_backward": _nll_backward,
    "aten.gather": _gather,
    "aten.scatter": _scatter,
    "aten.scatter_add": _scatter_add,
    "aten.index": _index,
    "aten.index_put": _index_put,
    "aten._unsafe_index_put": _index_put,
    "aten.index_select": _index_select,
    "aten.index_add": _index_add,
    # Of a weight alone, which is whole wherever it is read.
    "aten._weight_norm_interface": whole,
    "aten._weight_norm_interface_backward": whole,
}
