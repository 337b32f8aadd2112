"""Rules by op name; an op without one is computed whole on every rank, and said so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.program.program import Op, Value
from meshwright.program.rules import (
    create,
    experts,
    matmul,
    matrices,
    network,
    pointwise,
    position,
    reduce,
    shape,
    space,
    spectral,
)
from meshwright.program.rules.factor import (
    Carry,
    Dim,
    OpView,
    Rule,
    RuleMaker,
    carry_of,
    placed,
    shard_of,
)
from meshwright.program.rules.factor import whole as _whole
from meshwright.program.rules.user import declared, rule

__all__ = [
    "RULES",
    "Carry",
    "Dim",
    "OpView",
    "Rule",
    "RuleMaker",
    "carry_of",
    "placed",
    "rule",
    "rule_of",
    "shard_of",
]

RULES: Mapping[str, RuleMaker] = {
    **pointwise.RULES,
    **shape.RULES,
    **matmul.RULES,
    **reduce.RULES,
    **network.RULES,
    **space.RULES,
    **create.RULES,
    **experts.RULES,
    **matrices.RULES,
    **position.RULES,
    **spectral.RULES,
}


def rule_of(op: Op, values: Sequence[Value]) -> Rule:
    """The rule of `op`; the fallback has `known=False`."""
    view = OpView.of(op, values)
    maker = declared(op.base) or RULES.get(op.base)
    return maker(view) if maker is not None else _whole(view, known=False)
