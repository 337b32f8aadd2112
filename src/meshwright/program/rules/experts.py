"""Experts: rows pass freely; over `expert`, rows that were routed lie with their experts' weights.

A routed product reads rows that `dispatch` brought to the ranks that hold their experts: the axis
carries the rows, and splits the experts of the weights beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.program.program import Arg, Value
from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum

__all__ = ["RULES"]

_AXIS = "expert"


def _mm(view: OpView) -> Rule:
    """expert_mm(x (s i), ids (s), weights (e i o), routed) -> (s o)."""
    rule = einsum(view, ["s i", "s", "1 i o"], ["s o"], linear=[[0], [2]])
    return replace(rule, beside=((_AXIS, 2, 0),)) if view.arg(3) is True else rule


def _mm_weight(view: OpView) -> Rule:
    """expert_mm_weight(x (s i), gradient (s o), ids (s), experts, routed) -> (e i o)."""
    rule = einsum(view, ["s i", "s o", "s"], ["1 i o"], linear=[[0], [1]])
    beside = ((_AXIS, 3, 0),) if view.arg(4) is True else ()
    return replace(rule, beside=beside, arguments=_experts)


def _experts(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
    return (*args[:3], results[0].shape[0], *args[4:])


def _rows(view: OpView) -> Rule:
    """dispatch and combine(x (s ...), ids (s), experts) -> (s ...)."""
    rest = " ".join(f"d{k}" for k in range(1, len(view.operands[0].shape)))
    rows = f"s {rest}".strip()
    return einsum(view, [rows, "s"], [rows], linear=[[0]])


def _ids(view: OpView) -> Rule:
    """dispatch_ids(ids (s), experts) -> (s)."""
    return einsum(view, ["s"], ["s"])


RULES: dict[str, RuleMaker] = {
    "meshwright.expert_mm": _mm,
    "meshwright.expert_mm_weight": _mm_weight,
    "meshwright.dispatch": _rows,
    "meshwright.combine": _rows,
    "meshwright.dispatch_ids": _ids,
}
