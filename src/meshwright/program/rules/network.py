"""Layers that stay one op: softmax, norms, gates, attention, embedding, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.program.program import Arg, Ref, Value
from meshwright.program.rules.factor import Dim, OpView, Rule, RuleMaker, einsum, made, whole

__all__ = ["RULES"]

_MEAN = 1
"""aten's number for `reduction="mean"`."""


def _if(arg: Arg, pattern: str) -> str | None:
    """The pattern where the optional operand is there."""
    return pattern if isinstance(arg, Ref) else None


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
    return einsum(view, operands, made(view, full, stats, stats), keep=tail)


def _layer_norm_backward(view: OpView) -> Rule:
    full, stats, tail = _norm_patterns(view, len(view.operands[0].shape), 2)
    operands = [full, full, stats, stats, _if(view.arg(5), tail), _if(view.arg(6), tail)]
    return einsum(view, operands, made(view, full, tail, tail), keep=tail, linear=[[0]])


def _groups(view: OpView, place: int) -> tuple[Rule, Dim, tuple[Dim, ...], tuple[Dim, ...]]:
    """Of a norm over groups of channels, with arguments (.., N, C, space, groups) from `place`.

    Returns a rule without operands, and the dims of channels, of a full tensor and of statistics.
    Samples and groups may be split; a group's channels are whole.
    """
    samples, channels, groups = (view.number(place + k) for k in (0, 1, 3))
    each = channels // groups
    sizes = (samples, groups, each)
    stats = tuple((factor,) if sizes[factor] > 1 else () for factor in (0, 1))
    split = tuple(factor for factor in (1, 2) if sizes[factor] > 1)
    full = (stats[0], split, *((),) * (len(view.operands[0].shape) - 2))

    def local(args: tuple[Arg, ...], _: Sequence[Value]) -> tuple[Arg, ...]:
        count = args[place + 1]
        assert isinstance(count, int)
        return (*args[: place + 3], count // each, *args[place + 4 :])

    sized = ((place, 0, 0), (place + 1, 0, 1))
    rule = Rule(sizes, (), (), whole=frozenset({2}), count_args=sized, arguments=local)
    return rule, split, full, stats


def _group_norm(view: OpView) -> Rule:
    """native_group_norm(x, weight, bias, N, C, space, groups, eps) -> y, mean, rstd."""
    rule, channels, full, stats = _groups(view, 3)
    weights = ((channels,),) * (len(view.operands) - 1)
    results = tuple(made(view, full, stats, stats))
    return replace(rule, operands=(full, *weights), results=results)


def _group_norm_backward(view: OpView) -> Rule:
    """(grad, x, mean, rstd, weight, N, C, space, groups, mask) -> dx, dweight, dbias."""
    rule, channels, full, stats = _groups(view, 5)
    weights = ((channels,),) * (len(view.operands) - 4)
    results = tuple(made(view, full, (channels,), (channels,)))
    return replace(rule, operands=(full, full, stats, stats, *weights), results=results)


def _glu(view: OpView) -> Rule:
    """glu(x, dim): the two halves of a dim meet; glu_backward(grad, x, dim) likewise."""
    backward = view.op.base == "aten.glu_backward"
    shape = (view.results if not backward else view.operands)[0].shape
    dim = view.number(2 if backward else 1, -1) % len(shape)
    half = tuple((k,) if size > 1 else () for k, size in enumerate(shape))
    both = (*half[:dim], (len(shape), *half[dim]), *half[dim + 1 :])
    operands = (half, both) if backward else (both,)
    result = both if backward else half
    linear = (frozenset({0}),) if backward else ()
    return Rule((*shape, 2), operands, (result,), whole=frozenset({len(shape)}), linear=linear)


def _flash(view: OpView) -> Rule:
    """q (b h t d), k and v (b h s d) -> out (b h t d), logsumexp (b h t)."""
    q, k = "b h t d", _keys(view, 0)
    rule = einsum(view, [q, k, k, _mask(view)], made(view, q, "b h t"), keep=_kept(view, 0))
    return _grouped(rule, view, 0)


def _flash_backward(view: OpView) -> Rule:
    q, k = "b h t d", _keys(view, 1)
    operands = [q, q, k, k, q, "b h t", _mask(view)]
    rule = einsum(view, operands, made(view, q, k, k), keep=_kept(view, 1))
    return _grouped(rule, view, 1)


def _ring(view: OpView) -> Rule:
    """As attention, with queries split over `context` whatever each sees, and keys beside them."""
    query = 1 if view.op.base.endswith("_backward") else 0
    rule = (_flash_backward if query else _flash)(view)
    if not rule.operands[query][2]:
        return rule
    (rows,) = rule.operands[query][2]
    keys = [query + 1, query + 2]
    if query:
        keys += [
            len(view.operands) + sum(o is not None for o in view.op.outputs[:k]) for k in (1, 2)
        ]
    return replace(
        rule,
        whole=rule.whole - {rows},
        beside=tuple(("context", place, 2) for place in keys),
        plain=rule.plain | {rows},
        ring=rows,
    )


def _mask(view: OpView) -> str | None:
    """The attention mask's dims: (t s), or (b h t s) where any may be 1."""
    if not isinstance(dict(view.op.kwargs).get("attn_mask"), Ref):
        return None
    return " ".join(("b", "h", "t", "s")[4 - len(view.operands[-1].shape) :])


def _kept(view: OpView, query: int) -> str:
    """Letters that stay whole.

    Queries may be split unless a flag says which keys each sees: their gradient to keys and values
    is a sum.
    """
    causal = view.arg(7 if query else 4) is True
    return "s d" + " t" * causal


def _heads(view: OpView, query: int) -> tuple[int, int]:
    """Heads of queries and of keys; operand `query` holds the queries, the next one the keys."""
    return view.operands[query].shape[1], view.operands[query + 1].shape[1]


def _keys(view: OpView, query: int) -> str:
    heads, shared = _heads(view, query)
    return "b h s d" if heads == shared else "b k s d"


def _grouped(rule: Rule, view: OpView, query: int) -> Rule:
    """Where several queries share a key, heads are (heads of keys, queries that share one)."""
    heads, shared = _heads(view, query)
    if heads == shared:
        return rule
    (queries,), keys = rule.operands[query][1], rule.operands[query + 1][1]

    def dims(found: tuple[Dim, ...]) -> tuple[Dim, ...]:
        return tuple((*keys, queries) if dim == (queries,) else dim for dim in found)

    sizes = list(rule.sizes)
    sizes[queries] = heads // shared
    operands, results = tuple(map(dims, rule.operands)), tuple(map(dims, rule.results))
    return replace(rule, sizes=tuple(sizes), operands=operands, results=results)


def _embedding(view: OpView) -> Rule:
    """weight (v d), indices (...) -> (... d)."""
    index = [f"i{k}" for k in range(len(view.operands[1].shape))]
    out = " ".join([*index, "d"])
    rule = einsum(view, ["v d", " ".join(index)], [out], linear=[[0]])
    plain = len(view.op.args) < 4 or view.op.args[3] is False
    if not plain or not rule.operands[0][0]:
        return einsum(view, ["v d", " ".join(index)], [out], keep="v", linear=[[0]])
    rows = rule.operands[0][0][0]
    name = "meshwright.embedding_window.default"
    return replace(rule, window=(rows, name), plain=frozenset({rows}))


def _embedding_backward(view: OpView) -> Rule:
    """grad (... d), indices (...) -> (v d): sums over the indices."""
    index = [f"i{k}" for k in range(len(view.operands[1].shape))]
    keep = " ".join(index) if view.arg(4) is True else ""  # divides by how often each index occurs
    operands = [" ".join([*index, "d"]), " ".join(index)]
    rule = einsum(view, operands, ["v d"], keep=keep, linear=[[0]])
    if keep or not rule.results[0][0]:
        return einsum(view, operands, ["1 d"], keep=keep, linear=[[0]])
    rows = rule.results[0][0][0]
    name = "meshwright.embedding_window_backward.default"
    return replace(rule, window=(rows, name), plain=frozenset({rows}), arguments=_rows)


def _rows(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
    """embedding_dense_backward(grad, indices, rows, ..): the rows that this rank has."""
    return (*args[:2], results[0].shape[0], *args[3:])


def _nll_forward(view: OpView) -> Rule:
    """x (n c), target (n) -> sum of losses, sum of weights; a mean divides by all its weights."""
    if len(view.operands[0].shape) != 2 or view.number(3) == _MEAN:
        return whole(view)
    out = "n" if view.number(3) == 0 else ""
    weight = _if(view.arg(2), "c")
    return einsum(view, ["n c", "n", weight], made(view, out, ""), keep="c")


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
    """x.index_add(dim, index, source): what is added over a split index is a term."""
    shapes = [value.shape for value in view.operands]
    if len(shapes[0]) != len(shapes[2]) or len(shapes[1]) != 1:
        return whole(view)
    dim = view.number(1) % len(shapes[0])
    letters = [f"d{k}" for k in range(len(shapes[0]))]
    base = " ".join("1" if k == dim else letter for k, letter in enumerate(letters))
    given = " ".join(letters)
    return einsum(view, [base, letters[dim], given], [base], addends=[0], linear=[[0, 2]])


def _ctc(view: OpView) -> Rule:
    """log_probs (t n c), targets (n s), lengths (n) -> losses (n); each sample is alone."""
    operands = ["t n c", "n s", "n", "n"]
    if view.op.base == "meshwright.ctc":
        return einsum(view, operands, ["n"], keep="t c s")
    return einsum(view, ["n", *operands], ["t n c"], keep="t c s", linear=[[0]])


RULES: dict[str, RuleMaker] = {
    "meshwright.ctc": _ctc,
    "meshwright.ctc_backward": _ctc,
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
    "aten.glu": _glu,
    "aten.glu_backward": _glu,
    "aten._scaled_dot_product_flash_attention_for_cpu": _flash,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "meshwright.ring_attention": _ring,
    "meshwright.ring_attention_backward": _ring,
    "aten.embedding": _embedding,
    "aten.embedding_dense_backward": _embedding_backward,
    "aten.nll_loss_forward": _nll_forward,
    "aten.nll_loss_backward": _nll_backward,
    "aten.gather": _gather,
    "aten.scatter": _scatter,
    "aten.scatter_reduce": _scatter,
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
