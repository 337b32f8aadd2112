"""Matrix products. A bias added to a contraction must be partial beside it."""

from __future__ import annotations

from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum

__all__ = ["RULES"]


def _mm(view: OpView) -> Rule:
    return einsum(view, ["i k", "k j"], ["i j"], linear=[[0], [1]])


def _bmm(view: OpView) -> Rule:
    return einsum(view, ["b i k", "b k j"], ["b i j"], linear=[[0], [1]])


def _mv(view: OpView) -> Rule:
    return einsum(view, ["i k", "k"], ["i"], linear=[[0], [1]])


def _dot(view: OpView) -> Rule:
    return einsum(view, ["k", "k"], [""], linear=[[0], [1]])


def _bias(view: OpView, full: str) -> str:
    """The bias's dims, aligned right to the result's."""
    return " ".join(full.split()[len(full.split()) - len(view.operands[0].shape) :])


def _addmm(view: OpView) -> Rule:
    return einsum(view, [_bias(view, "i j"), "i k", "k j"], ["i j"], addends=[0])


def _baddbmm(view: OpView) -> Rule:
    return einsum(view, [_bias(view, "b i j"), "b i k", "b k j"], ["b i j"], addends=[0])


RULES: dict[str, RuleMaker] = {
    "aten.mm": _mm,
    "aten.bmm": _bmm,
    "aten.mv": _mv,
    "aten.dot": _dot,
    "aten.vdot": _dot,
    "aten.addmm": _addmm,
    "aten.baddbmm": _baddbmm,
}
