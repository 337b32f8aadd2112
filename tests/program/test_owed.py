"""Partial sums are paid for once, where that costs least."""

from __future__ import annotations

import pytest

from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.partition import COLLECTIVES, partition
from meshwright.program.program import Ref
from meshwright.program.propagate import propagate
from tests.program.graphs import Graph
from tests.program.worlds import assert_holds, axes_of, everywhere, give, run_everywhere

ROWS = 6


class Sums(Graph):
    """A program that starts from partial sums."""

    def __init__(self):
        super().__init__()
        self.pinned = {}

    def owed(self, rows=ROWS, columns=4):
        """A product whose contracted dim is split."""
        x, w = self.input(rows, 8), self.input(8, columns)
        self.pinned |= {
            x: Layout((("data", Shard(1)),)),
            w: Layout((("data", Shard(0)),)),
        }
        return self.call("mm.default", Ref(x), Ref(w))[0]

    def one(self, name, *args):
        """The result of an op."""
        return self.call(name, *args)[0]

    def paid(self, *outputs):
        """Shapes of what is all-reduced where all outputs are wanted whole; the numbers hold."""
        program, axes = self.program(outputs), axes_of(2)
        whole = {name: REPLICATED for name, _ in program.outputs}
        found, laid, _ = run_everywhere(
            program, axes, give(program, self.given(), axes), whole, self.pinned
        )
        for name, value in program.outputs:
            parts = [rank[name] for rank in found]
            assert_holds(parts, self.tensors[value], laid[name], axes, 1e-12)
        completed = propagate(program, axes, self.pinned)
        local = partition(program, completed, axes, everywhere(axes)[0], whole).program
        moves = [op for op in local.ops if op.name in COLLECTIVES]
        assert {op.name for op in moves} <= {"comm.all_reduce"}
        return [local.values[op.results[0]].shape for op in moves]


@pytest.fixture
def sums():
    return Sums()


def test_a_sum_and_its_transpose_are_paid_for_together(sums):
    made = sums.owed()
    turned = sums.one("t.default", Ref(made))
    ends = [sums.one("relu.default", Ref(v)) for v in (turned, made)]
    assert sums.paid(*ends) == [(ROWS, 4)]


def test_a_sum_and_its_square_are_paid_for_together(sums):
    """As in a norm: what is scaled comes before what is squared."""
    made = sums.owed()
    copy = sums.one("clone.default", Ref(made))
    square = sums.one("pow.Tensor_Scalar", Ref(copy), 2)
    scaled = sums.one("mul.Tensor", Ref(made), Ref(square))
    assert sums.paid(sums.one("relu.default", Ref(scaled))) == [(ROWS, 4)]


def test_sums_that_meet_are_paid_for_where_they_meet(sums):
    a, b, c = (sums.owed() for _ in range(3))
    total = sums.one("add.Tensor", Ref(sums.one("add.Tensor", Ref(a), Ref(b))), Ref(c))
    assert sums.paid(sums.one("relu.default", Ref(total))) == [(ROWS, 4)]


def test_a_smaller_sum_waits_for_a_larger_one_that_it_is_added_to(sums):
    row, table = sums.owed(rows=1), sums.owed()
    total = sums.one("add.Tensor", Ref(table), Ref(row))
    assert sums.paid(sums.one("relu.default", Ref(total))) == [(ROWS, 4)]


def test_what_would_grow_is_paid_for_before(sums):
    column = sums.owed(columns=1)
    wide = sums.one("expand.default", Ref(column), (ROWS, 50))
    assert sums.paid(sums.one("relu.default", Ref(wide))) == [(ROWS, 1)]


def test_parts_of_one_whole_are_paid_for_as_one(sums):
    """Gradients of slices: each is padded with zeros, and they are added."""
    parts = [sums.owed(rows=2) for _ in range(3)]
    padded = [
        sums.one("slice_backward.default", Ref(part), (6, 4), 0, 2 * k, 2 * k + 2, 1)
        for k, part in enumerate(parts)
    ]
    total = sums.one("add.Tensor", Ref(padded[0]), Ref(padded[1]))
    total = sums.one("add.Tensor", Ref(total), Ref(padded[2]))
    assert sums.paid(sums.one("relu.default", Ref(total))) == [(6, 4)]


def test_what_is_summed_up_anyway_is_left_to_the_end(sums):
    made = sums.owed()
    total = sums.one("sum.default", Ref(made))
    assert sums.paid(total) == [()]
