"""Slices: squares of the terms of sums cost nothing to send, and are of what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.errors import UserCodeError
from meshwright.job import AdaScale
from meshwright.program.partition import COLLECTIVES
from meshwright.program.slices import SQUARES, require_even
from meshwright.run.form import first_micros
from tests.equal.harness import Case
from tests.run.jobs import job, sgd

PLAIN = job(optimizer=sgd)
SLICED = replace(PLAIN, adascale=AdaScale(4))


def sent(made, plan):
    """(collective, axis, elements) of each distinct micro-batch of a rank; the totals' names."""
    case = Case(made)
    build = case.build(plan)
    lowered = build.lowered(0, first_micros(build, case.data))
    programs = [local.program for _, local in lowered.compiled.units]
    moves = [
        (op.name, op.args[1], program.values[op.results[0]].elements)
        for program in programs
        for op in program.ops
        if op.name in COLLECTIVES
    ]
    return sorted(moves), lowered.totals


@pytest.mark.parametrize("plan", ["data=4", "data=2,microbatches=2", "zero3,data=2,microbatches=2"])
def test_slices_that_ranks_have_are_squared_before_they_are_summed(plan):
    moves, totals = sent(SLICED, plan)
    plain, others = sent(PLAIN, plan)
    assert moves == plain
    names = {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert {n.removeprefix(SQUARES) for n in totals if n.startswith(SQUARES)} == names
    assert not any(name.startswith(SQUARES) for name in others)


@pytest.mark.parametrize("zero", ["", "zero2,", "zero3,"])
def test_slices_that_are_micro_batches_are_summed_for_each(zero):
    plan = f"{zero}data=2,microbatches=4"
    moves, _ = sent(SLICED, plan)
    plain, _ = sent(PLAIN, f"{plan},reduce=microbatch")
    assert moves == plain


def test_counts_that_differ_are_told_with_their_line():
    totals = {"count/apart/a.py:3#7": 9.0 + 16.0, "count/together/a.py:3#7": 49.0}
    with pytest.raises(UserCodeError, match=r"in step 2 .* in what a.py:3 counts over a micro"):
        require_even(totals, 2, "step 2")
    require_even({**totals, "count/apart/a.py:3#7": 24.5}, 2, "step 2")
    million = {"count/apart/a#1": 2e10 + 2, "count/together/a#1": 4e10}
    with pytest.raises(UserCodeError, match="return \\(sum, weight\\) from the loss"):
        require_even(million, 2, "step 1")
