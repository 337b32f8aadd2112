"""Conflicts that propagation resolved: who won, and what the loser costs."""

from __future__ import annotations

import pytest

from meshwright.program.conflict import conflicts
from meshwright.program.explain import collectives
from tests.program.accounted import BATCH, ROWS, WIDTH, gpt, laid, torn


def test_an_op_whose_operands_lie_differently_is_told_with_its_cost():
    compiled, axes = laid(torn(), "tensor=2")
    found = [c for c in conflicts(compiled, axes) if c.op == "aten::mul" and c.phase == "forward"]
    (lost,) = [c for c in found if "sharded(2)" in c.loser]
    assert lost.winner == "operand 0 sharded(1) over tensor"
    assert lost.loser == "operand 1 sharded(2) over tensor"
    assert (lost.axis, lost.wanted, lost.count) == ("tensor", "sharded(1) over tensor", 1)
    assert lost.source.rpartition("/")[2].startswith("accounted.py:")
    assert lost.loser_bytes == 4 * BATCH * 2 * ROWS * WIDTH
    rows = [r for r in collectives(compiled, axes) if r.source == lost.source]
    moved = [r for r in rows if r.op == "all_to_all" and r.phase == "forward"]
    assert lost.bytes == sum(r.bytes for r in moved) > 0


def test_annotated_alike_there_is_none():
    assert conflicts(*laid(torn(alike=True), "tensor=2")) == ()


@pytest.mark.parametrize("plan", ["data=2", "zero3,data=2", "tensor=2", "zero1,data=2,tensor=2"])
def test_a_transformer_has_none(plan):
    """Weights at rest are gathered for each use: that is ZeRO's price, and no conflict."""
    assert conflicts(*laid(gpt(), plan)) == ()


def test_what_losers_cost_is_never_more_than_what_is_moved():
    compiled, axes = laid(torn(), "tensor=2")
    assert sum(c.bytes for c in conflicts(compiled, axes)) <= sum(
        row.bytes for row in collectives(compiled, axes)
    )
