"""Ops that go by position along a dim, or by value: what they mix is whole, the other dims pass."""

from __future__ import annotations

from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum, whole

__all__ = ["RULES"]


def _letters(rank: int) -> list[str]:
    return [f"d{k}" for k in range(rank)]


def _diagonal(view: OpView) -> Rule:
    """diagonal(x, offset, dim1, dim2): the two dims meet in a last one."""
    rank = len(view.operands[0].shape)
    met = {view.number(2, 0) % rank, view.number(3, 1) % rank}
    letters = ["1" if k in met else f"d{k}" for k in range(rank)]
    rest = [f"d{k}" for k in range(rank) if k not in met]
    return einsum(view, [" ".join(letters)], [" ".join([*rest, "1"])], linear=[[0]])


def _diagonal_backward(view: OpView) -> Rule:
    """diagonal_backward(grad, sizes, offset, dim1, dim2) and diag_embed(x, offset, dim1, dim2)."""
    backward = view.op.base == "aten.diagonal_backward"
    rank = len(view.results[0].shape)
    first, missing = (3, (0, 1)) if backward else (2, (-2, -1))
    met = {view.number(first + k, missing[k]) % rank for k in (0, 1)}
    letters = ["1" if k in met else f"d{k}" for k in range(rank)]
    rest = [f"d{k}" for k in range(rank) if k not in met]
    sized = [(1, 0)] if backward else []
    given = " ".join([*rest, "1"])
    return einsum(view, [given], [" ".join(letters)], linear=[[0]], shape_args=sized)


def _diagonal_scatter(view: OpView) -> Rule:
    """x with its diagonal replaced."""
    rank = len(view.operands[0].shape)
    met = {view.number(3, 0) % rank, view.number(4, 1) % rank}
    letters = " ".join("1" if k in met else f"d{k}" for k in range(rank))
    rest = " ".join([*(f"d{k}" for k in range(rank) if k not in met), "1"])
    return einsum(view, [letters, rest], [letters], linear=[[0, 1]])


def _ordered(place: int, missing: int) -> RuleMaker:
    """Ops whose dim is argument `place`: running maxima, the k-th value, the most frequent one."""

    def rule(view: OpView) -> Rule:
        rank = len(view.operands[0].shape)
        if not rank:
            return whole(view)
        dim = view.number(place, missing) % rank
        letters = ["1" if k == dim else f"d{k}" for k in range(rank)]
        kept = len(view.results[0].shape) == rank
        made = letters if kept else letters[:dim] + letters[dim + 1 :]
        return einsum(view, [" ".join(letters)], [" ".join(made)] * len(view.results))

    return rule


def _rows_replaced(view: OpView) -> Rule:
    """index_copy, index_reduce (x, dim, index, source) and index_fill(x, dim, index, value)."""
    rank = len(view.operands[0].shape)
    if not rank:
        return whole(view)
    dim = view.number(1) % rank
    pattern = " ".join("1" if k == dim else f"d{k}" for k in range(rank))
    last = [pattern] if len(view.operands[-1].shape) == rank else [""]
    more = last if len(view.operands) == 3 else []
    return einsum(view, [pattern, "1", *more], [pattern])


def _bucketize(view: OpView) -> Rule:
    """bucketize(x, boundaries): x passes; of a number it is whole."""
    if len(view.operands) != 2:
        return whole(view)
    return einsum(view, ["...", "1"], ["..."])


def _searchsorted(view: OpView) -> Rule:
    """searchsorted(sorted (.. s), x (.. n)): rows of both meet; one row serves all of x."""
    if len(view.operands) != 2:
        return whole(view)
    rows, x = (len(value.shape) for value in view.operands)
    if rows == 1:
        letters = " ".join(_letters(x))
        return einsum(view, ["1", letters], [letters])
    lead = _letters(rows - 1)
    found = " ".join([*lead, "n"])
    return einsum(view, [" ".join([*lead, "1"]), found], [found])


def _isin(view: OpView) -> Rule:
    """isin(x, among): x passes."""
    if len(view.operands) != 2:
        return whole(view)
    x, among = (len(value.shape) for value in view.operands)
    letters = " ".join(_letters(x))
    return einsum(view, [letters, " ".join(["1"] * among)], [letters])


def _outer(view: OpView) -> Rule:
    """addr(x, i, j): an outer product beside x, which is broadcast."""
    shape = view.operands[0].shape
    return einsum(view, [" ".join(("i", "j")[2 - len(shape) :]), "i", "j"], ["i j"])


def _addmv(view: OpView) -> Rule:
    """addmv(x, matrix, vector)."""
    bias = "i" if view.operands[0].shape else ""
    return einsum(view, [bias, "i k", "k"], ["i"], addends=[0])


def _addbmm(view: OpView) -> Rule:
    """addbmm(x, a, b): products summed over the batch, beside x."""
    bias = " ".join(("i", "j")[2 - len(view.operands[0].shape) :])
    return einsum(view, [bias, "b i k", "b k j"], ["i j"], addends=[0])


def _counted(view: OpView) -> Rule:
    """count_nonzero(x, dims): parts give counts to add up."""
    rank = len(view.operands[0].shape)
    dims = view.dims(1, rank) if rank else ()
    letters = _letters(rank)
    made = " ".join(letter for k, letter in enumerate(letters) if k not in dims)
    return einsum(view, [" ".join(letters)], [made])


def _renorm(view: OpView) -> Rule:
    """renorm(x, p, dim, most): each slice of a dim is whole, the dim itself passes."""
    rank = len(view.operands[0].shape)
    dim = view.number(2) % rank
    pattern = " ".join(f"d{k}" if k == dim else "1" for k in range(rank))
    return einsum(view, [pattern], [pattern])


def _rotated(view: OpView) -> Rule:
    """rot90(x, times, dims): the two dims turn into each other."""
    rank = len(view.operands[0].shape)
    dims = view.dims(2, rank) if len(view.op.args) > 2 else (0, 1)
    pattern = " ".join("1" if k in dims else f"d{k}" for k in range(rank))
    return einsum(view, [pattern], [pattern], linear=[[0]])


RULES: dict[str, RuleMaker] = {
    "aten.diagonal": _diagonal,
    "aten.diagonal_backward": _diagonal_backward,
    "aten.diagonal_scatter": _diagonal_scatter,
    "aten.diag_embed": _diagonal_backward,
    "aten.cummax": _ordered(1, 0),
    "aten.cummin": _ordered(1, 0),
    "aten.logcumsumexp": _ordered(1, 0),
    "aten._logcumsumexp": _ordered(1, 0),
    "aten.kthvalue": _ordered(2, -1),
    "aten.mode": _ordered(1, -1),
    "aten.index_copy": _rows_replaced,
    "aten.index_fill": _rows_replaced,
    "aten.index_reduce": _rows_replaced,
    "aten.bucketize": _bucketize,
    "aten.searchsorted": _searchsorted,
    "aten.isin": _isin,
    "aten.addr": _outer,
    "aten.addmv": _addmv,
    "aten.addbmm": _addbmm,
    "aten.count_nonzero": _counted,
    "aten.renorm": _renorm,
    "aten.rot90": _rotated,
}
