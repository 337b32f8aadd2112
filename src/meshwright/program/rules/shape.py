"""Views and moves of dims: nothing is computed, factors are renamed, split and joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from meshwright.program.program import Arg, Value
from meshwright.program.rules.factor import (
    Dim,
    Localize,
    OpView,
    Rule,
    RuleMaker,
    einsum,
    whole,
)

__all__ = ["RULES", "split_factors"]

_LINEAR = (frozenset({0}),)


def split_factors(
    before: Sequence[int], after: Sequence[int]
) -> tuple[tuple[int, ...], tuple[Dim, ...], tuple[Dim, ...]] | None:
    """(factor sizes, dims of `before`, dims of `after`): the finest factors both are products of.

    Where one dim's borders do not divide the other's, e.g. (6, 4) to (8, 3), the whole run of dims
    gets no factor. None where the two have not the same number of elements, or it is zero.
    """
    if math.prod(before) != math.prod(after) or math.prod(before) == 0:
        return None
    sizes: list[int] = []
    left: list[Dim] = [()] * len(before)
    right: list[Dim] = [()] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0, a, b = i, j, 1, 1
        while i == i0 or j == j0 or a != b:
            if (a <= b and i < len(before)) or j == len(after):
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
            if a == b == 1 and i == len(before) and j == len(after):
                break
        _split_run(before, after, (i0, i), (j0, j), sizes, left, right)
    return tuple(sizes), tuple(left), tuple(right)


def _split_run(
    before: Sequence[int],
    after: Sequence[int],
    run: tuple[int, int],
    other: tuple[int, int],
    sizes: list[int],
    left: list[Dim],
    right: list[Dim],
) -> None:
    """Factor one run of dims with equal products on both sides."""

    def borders(shape: Sequence[int], start: int, stop: int) -> list[int]:
        found, product = [1], 1
        for size in shape[start:stop]:
            product *= size
            found.append(product)
        return found

    cuts = sorted({*borders(before, *run), *borders(after, *other)})
    if any(high % low for low, high in pairwise(cuts)):
        return
    place = {low: len(sizes) + k for k, low in enumerate(cuts[:-1])}
    sizes += [high // low for low, high in pairwise(cuts)]
    for shape, (start, stop), dims in ((before, run, left), (after, other, right)):
        product = 1
        for number in range(start, stop):
            low, product = product, product * shape[number]
            dims[number] = tuple(place[cut] for cut in cuts[:-1] if low <= cut < product)


def _view(view: OpView) -> Rule:
    if view.op.name == "aten.view.dtype":
        return whole(view)
    found = split_factors(view.operands[0].shape, view.results[0].shape)
    if found is None:
        return whole(view)
    sizes, left, right = found
    args = () if view.op.base in ("aten.squeeze", "aten.unsqueeze") else ((1, 0),)
    return Rule(sizes, (left,), (right,), linear=_LINEAR, shape_args=args)


def _permuted(view: OpView, order: Sequence[int]) -> Rule:
    letters = [f"d{k}" for k in range(len(view.operands[0].shape))]
    result = " ".join(letters[k] for k in order)
    return einsum(view, [" ".join(letters)], [result], linear=[[0]])


def _t(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    return _permuted(view, range(rank)[::-1])


def _transpose(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    order = list(range(rank))
    a, b = view.number(1) % rank, view.number(2) % rank
    order[a], order[b] = order[b], order[a]
    return _permuted(view, order)


def _permute(view: OpView) -> Rule:
    return _permuted(view, view.dims(1, len(view.operands[0].shape)))


def _expand(view: OpView) -> Rule:
    return einsum(view, ["..."], ["..."], linear=[[0]], shape_args=[(1, 0)])


def _same_but(view: OpView, dims: Sequence[int], args: Sequence[tuple[int, int]] = ()) -> Rule:
    """All dims pass but `dims`, whose sizes change or whose elements mix."""
    rank = len(view.operands[0].shape)
    letters = ["1" if k in dims else f"d{k}" for k in range(rank)]
    pattern = " ".join(letters)
    count = len(view.results)
    linear = [list(range(len(view.operands)))]
    return einsum(
        view, [pattern] * len(view.operands), [pattern] * count, linear=linear, shape_args=args
    )


def _parts(
    view: OpView, dim: int, count: int, arguments: Localize | None = None, *, joined: bool = False
) -> Rule:
    """A dim of `count` equal parts, side by side: a fused qkv and its three, in either direction.

    Args:
        view: of the op.
        dim: that the parts make up.
        count: of parts.
        arguments: how the arguments become local.
        joined: the results have all parts (cat); else the operands have (split).
    """
    rank = len(view.operands[0].shape)
    whole_dim = (view.results if joined else view.operands)[0].shape[dim]
    shape = (*view.operands[0].shape[:dim], whole_dim // count, *view.operands[0].shape[dim + 1 :])
    sizes = (*shape, count)
    one = tuple((k,) if shape[k] > 1 else () for k in range(rank))
    fused = (*one[:dim], (rank, dim), *one[dim + 1 :])
    given, made = (one, fused) if joined else (fused, one)
    return Rule(
        sizes,
        (given,) * len(view.operands),
        (made,) * len(view.results),
        whole=frozenset({rank}),
        linear=(frozenset(range(len(view.operands))),),
        arguments=arguments,
    )


def _slice(view: OpView) -> Rule:
    shape, made = view.operands[0].shape, view.results[0].shape
    dim = view.number(1, 0) % len(shape)
    if view.number(4, 1) != 1:
        return _same_but(view, [dim])
    if shape == made:
        return _same_but(view, [])
    start, length = _begin(view.arg(2), shape[dim]), made[dim]
    if not length or shape[dim] % length or start % length:
        return _same_but(view, [dim])

    def local(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
        size = results[0].shape[dim]
        begin = start // length * size
        return (*args[:2], begin, begin + size, *args[4:])

    return _parts(view, dim, shape[dim] // length, local)


def _begin(start: Arg, size: int) -> int:
    """Where a slice begins: counted from the end where negative."""
    begin = start if isinstance(start, int) else 0
    return min(begin, size) if begin >= 0 else max(0, begin + size)


def _split(view: OpView) -> Rule:
    dim = view.number(2, 0) % len(view.operands[0].shape)
    sizes = {value.shape[dim] for value in view.results}
    count = len(view.op.outputs)
    if len(sizes) != 1 or count * min(sizes) != view.operands[0].shape[dim] or not min(sizes):
        return _same_but(view, [dim])

    def local(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
        size = results[0].shape[dim]
        return (args[0], (size,) * count if isinstance(args[1], tuple) else size, *args[2:])

    return _parts(view, dim, count, local)


def _cat(view: OpView) -> Rule:
    rank = len(view.results[0].shape)
    dim = view.number(1, 0) % rank
    if any(len(value.shape) != rank for value in view.operands):
        return _cat_with_empty(view, dim)
    sizes = {value.shape[dim] for value in view.operands}
    if len(sizes) != 1 or not min(sizes):
        return _same_but(view, [dim])
    return _parts(view, dim, len(view.operands), joined=True)


def _cat_with_empty(view: OpView, dim: int) -> Rule:
    """Of one-dim tensors without elements, which torch lets stand beside any shape, too.

    A cache begins with one: then there is one other operand, and the result is a copy of it.
    """
    rank = len(view.results[0].shape)
    full = [place for place, value in enumerate(view.operands) if len(value.shape) == rank]
    mixed = len(full) > 1
    pattern = " ".join("1" if mixed and k == dim else f"d{k}" for k in range(rank))
    patterns = [pattern if place in full else "1" for place in range(len(view.operands))]
    return einsum(view, patterns, [pattern], linear=[full])


def _along(view: OpView) -> Rule:
    """Elements mix along the dims argument only (cumsum, flip, roll, sort ...)."""
    rank = len(view.operands[0].shape)
    if rank == 0:
        return whole(view)
    dims = view.dims(2 if view.op.base == "aten.roll" else 1, rank)
    rule = _same_but(view, dims)
    return rule if view.op.base in ("aten.cumsum", "aten.flip", "aten.roll") else _nonlinear(rule)


def _nonlinear(rule: Rule) -> Rule:
    return Rule(rule.sizes, rule.operands, rule.results, shape_args=rule.shape_args)


def _sort(view: OpView) -> Rule:
    """sort(x, dim, descending); in sort.stable all but x are named."""
    rank = len(view.operands[0].shape)
    dim = dict(view.op.kwargs).get("dim", view.number(1, -1))
    assert isinstance(dim, int), view.op
    return _nonlinear(_same_but(view, [dim % rank])) if rank else whole(view)


def _topk(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    return _nonlinear(_same_but(view, [view.number(2, -1) % rank])) if rank else whole(view)


def _last_two(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    return _same_but(view, [rank - 2, rank - 1])


def _select(view: OpView) -> Rule:
    shape = view.operands[0].shape
    dim = view.number(1) % len(shape)
    letters = [f"d{k}" for k in range(len(shape))]
    rest = " ".join(letters[:dim] + letters[dim + 1 :])
    return einsum(
        view, [" ".join(letters)], [rest] * len(view.results), keep=letters[dim], linear=[[0]]
    )


def _unbind(view: OpView) -> Rule:
    shape = view.operands[0].shape
    dim = view.number(1, 0) % len(shape)
    letters = [f"d{k}" for k in range(len(shape))]
    rest = " ".join(letters[:dim] + letters[dim + 1 :])
    return einsum(
        view, [" ".join(letters)], [rest] * len(view.results), keep=letters[dim], linear=[[0]]
    )


def _stack(view: OpView) -> Rule:
    rank = len(view.results[0].shape)
    dim = view.number(1, 0) % rank
    letters = ["1" if k == dim else f"d{k}" for k in range(rank)]
    rest = " ".join(letters[:dim] + letters[dim + 1 :])
    count = len(view.operands)
    return einsum(view, [rest] * count, [" ".join(letters)], linear=[list(range(count))])


def _select_backward(view: OpView) -> Rule:
    rank = len(view.results[0].shape)
    dim = view.number(2) % rank
    letters = ["1" if k == dim else f"d{k}" for k in range(rank)]
    rest = " ".join(letters[:dim] + letters[dim + 1 :])
    return einsum(view, [rest], [" ".join(letters)], linear=[[0]], shape_args=[(1, 0)])


def _slice_backward(view: OpView) -> Rule:
    shape, made = view.operands[0].shape, view.results[0].shape
    if shape == made:
        return _same_but(view, [], [(1, 0)])
    dim = view.number(2) % len(made)
    start, length = _begin(view.arg(3), made[dim]), shape[dim]
    if view.number(5, 1) != 1 or not length or made[dim] % length or start % length:
        return _same_but(view, [dim], [(1, 0)])
    count = made[dim] // length

    def local(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
        size = results[0].shape[dim] // count
        begin = start // length * size
        return (args[0], results[0].shape, args[2], begin, begin + size, *args[5:])

    return _parts(view, dim, count, local, joined=True)


def _pad(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    padding = view.numbers(1) or ()
    dims = [rank - 1 - k // 2 for k, amount in enumerate(padding) if amount]
    rule = _same_but(view, dims)
    return rule if view.arg(2, 0) in (0, 0.0) else _nonlinear(rule)


def _slice_scatter(view: OpView) -> Rule:
    """x with part of one dim replaced by another tensor's values: linear in both together."""
    return _same_but(view, [view.number(2, 0) % len(view.operands[0].shape)])


def _select_scatter(view: OpView) -> Rule:
    """x with one place of a dim replaced by a tensor that lacks the dim."""
    rank = len(view.operands[0].shape)
    dim = view.number(2) % rank
    letters = ["1" if k == dim else f"d{k}" for k in range(rank)]
    rest = letters[:dim] + letters[dim + 1 :]
    full = " ".join(letters)
    return einsum(view, [full, " ".join(rest)], [full], linear=[[0, 1]])


def _unfold(view: OpView) -> Rule:
    """unfold(x, dim, size, step): windows along a dim, what each holds in a new last one."""
    backward = view.op.base == "aten.unfold_backward"
    rank = len((view.results if backward else view.operands)[0].shape)
    dim = view.number(2 if backward else 1) % max(rank, 1)
    letters = ["1" if k == dim else f"d{k}" for k in range(rank)]
    flat, apart = " ".join(letters), " ".join([*letters, "1"])
    if backward:
        return einsum(view, [apart], [flat], linear=[[0]], shape_args=[(1, 0)])
    return einsum(view, [flat], [apart], linear=[[0]])


RULES: dict[str, RuleMaker] = {
    **dict.fromkeys(
        ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.unsqueeze", "aten.squeeze"), _view
    ),
    "aten.t": _t,
    "aten.transpose": _transpose,
    "aten.permute": _permute,
    "aten.expand": _expand,
    "aten.slice": _slice,
    "aten.slice_backward": _slice_backward,
    "aten.select": _select,
    "aten.select_backward": _select_backward,
    "aten.unbind": _unbind,
    "aten.stack": _stack,
    "aten.slice_scatter": _slice_scatter,
    "aten.select_scatter": _select_scatter,
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.unsafe_split"), _split),
    "aten.cat": _cat,
    "aten.unfold": _unfold,
    "aten.unfold_backward": _unfold,
    "aten.constant_pad_nd": _pad,
    "aten.tril": _last_two,
    "aten.triu": _last_two,
    **dict.fromkeys(("aten.cumsum", "aten.cumprod", "aten.flip", "aten.roll"), _along),
    "aten.sort": _sort,
    "aten.topk": _topk,
}
