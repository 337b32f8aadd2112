"""Reductions: a carried factor that is summed away leaves the result partial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum, whole

__all__ = ["RULES"]


def _patterns(rank: int, dims: Sequence[int], *, keepdim: bool) -> tuple[str, str]:
    letters = [f"d{k}" for k in range(rank)]
    filler = ["1"] if keepdim else []
    result = [x for k, letter in enumerate(letters) for x in (filler if k in dims else [letter])]
    return " ".join(letters), " ".join(result)


def _sum(view: OpView) -> Rule:
    rank = len(view.operands[0].shape)
    dims = view.dims(1, rank)
    operand, result = _patterns(rank, dims, keepdim=view.arg(2, default=False) is True)
    return einsum(view, [operand], [result], linear=[[0]])


def _square(view: OpView) -> Rule:
    """The sum of squares; over the axes that it names, of each rank's term of a partial sum."""
    (operand,), (_, axes) = view.operands, view.op.args
    assert isinstance(axes, str)
    letters = " ".join(f"d{k}" for k in range(len(operand.shape)))
    return replace(einsum(view, [letters], [""]), apart=frozenset(axes.split(",")))


def _extreme(view: OpView, reduction: Literal["max", "min"]) -> Rule:
    rank = len(view.operands[0].shape)
    dims = view.dims(1, rank)
    operand, result = _patterns(rank, dims, keepdim=view.arg(2, default=False) is True)
    return einsum(view, [operand], [result], reduction=reduction)


def _max(view: OpView) -> Rule:
    return _extreme(view, "max")


def _min(view: OpView) -> Rule:
    return _extreme(view, "min")


def _whole_dims(view: OpView) -> Rule:
    """Reductions that need their dims whole (argmax, any, prod, norms, variances)."""
    rank = len(view.operands[0].shape)
    if view.op.base == "aten.linalg_vector_norm":
        place, keep = 2, 3
    elif view.op.name == "aten.var_mean.correction" or view.op.name == "aten.var.correction":
        place, keep = 1, 9
    else:
        place, keep = 1, 2
    dims = view.dims(place, rank) if rank else ()
    named = dict(view.op.kwargs)
    keepdim = view.arg(keep, default=False) is True or named.get("keepdim") is True
    operand, result = _patterns(rank, dims, keepdim=keepdim)
    kept = " ".join(f"d{k}" for k in dims)
    if any(len(made.shape) != len(result.split()) for made in view.results):
        return whole(view)
    return einsum(view, [operand], [result] * len(view.results), keep=kept)


def _histogram(view: OpView) -> Rule:
    """histc(x, bins, min, max): counts over given bins add up; else they depend on all of x."""
    if view.arg(2, 0) == view.arg(3, 0):
        return whole(view)
    letters = " ".join(f"d{k}" for k in range(len(view.operands[0].shape)))
    return einsum(view, [letters], ["1"])


RULES: dict[str, RuleMaker] = {
    "aten.sum": _sum,
    "meshwright.square": _square,
    "aten.histc": _histogram,
    "aten.amax": _max,
    "aten.amin": _min,
    **dict.fromkeys(
        (
            "aten.any",
            "aten.all",
            "aten.prod",
            "aten.argmax",
            "aten.argmin",
            "aten.max",
            "aten.min",
            "aten.logsumexp",
            "aten.linalg_vector_norm",
            "aten.var",
            "aten.var_mean",
            "aten.std",
            "aten.median",
        ),
        _whole_dims,
    ),
}
