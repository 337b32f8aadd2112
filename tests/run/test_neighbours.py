"""Plans near a plan: legal ones, each once, and priced by what they would really do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan.check import Facts, check
from meshwright.plan.plan import Plan
from meshwright.run.describe import explain
from meshwright.run.neighbours import lighter, price, priced, smaller
from meshwright.run.prepare import prepare
from tests.program.accounted import gpt
from tests.run.jobs import job


@given(
    data=st.sampled_from([1, 2, 3, 4, 8]),
    tensor=st.sampled_from([1, 2, 4]),
    zero=st.integers(0, 3),
    microbatches=st.sampled_from([1, 2, 4]),
    batch=st.integers(8, 64),
)
def test_they_are_other_plans_for_as_many_ranks(data, tensor, zero, microbatches, batch):
    plan = Plan(data=data, tensor=tensor, zero=zero, microbatches=microbatches)
    for found in (list(lighter(plan)), list(smaller(plan, batch))):
        assert plan not in found
        assert len(set(found)) == len(found) <= 13
        for other in found:
            assert other.ranks == plan.ranks
            assert not other.zero or (other.data or 1) > 1
            assert other.microbatches <= max(batch // data, plan.microbatches)


def test_smaller_changes_come_first():
    assert [plan.text() for plan in smaller(Plan(data=4), 32)] == [
        "zero1,data=4", "zero2,data=4", "zero3,data=4", "data=4,microbatches=2",
        "data=4,microbatches=4", "data=2,tensor=2", "data=1,tensor=4",
        "zero3,data=4,microbatches=2", "zero3,data=4,microbatches=4", "zero3,data=2,tensor=2",
    ]  # fmt: skip
    assert [plan.text() for plan in lighter(Plan(data=2, tensor=2, zero=2, microbatches=3))] == [
        "zero1,data=2,tensor=2,microbatches=3", "data=2,tensor=2,microbatches=3",
        "zero2,data=2,tensor=2", "data=2,tensor=2", "zero2,data=4,microbatches=3",
        "data=1,tensor=4,microbatches=3",
    ]  # fmt: skip


def test_hybrid_groups_that_no_longer_divide_are_dropped():
    found = {p.text() for p in smaller(Plan(data=4, shard=4, zero=2), 32)}
    assert "zero3,data=2,tensor=2" in found
    assert "zero3,data=4,shard=4" in found
    assert all(not check(Plan.parse(text), Facts(4, 32)) for text in found)


@pytest.mark.parametrize("text", ["data=2", "zero3,data=2", "data=2,microbatches=3"])
def test_a_price_is_what_the_plans_explanation_says(text):
    plan = Plan.parse(text)
    found, told = price(prepare(job(), plan, 2)), explain(job(), plan, 2)
    assert found.moved == told["traffic"]["bytes"]
    assert found.memory == max(sum(entry["parts"].values()) for entry in told["memory"])


def test_plans_that_the_job_cannot_run_under_are_left_out():
    few = [Plan(data=2), Plan(data=64), Plan(data=2, microbatches=8)]
    assert [found.plan for found in priced(gpt(1), few)] == [Plan(data=2)]


def test_zero_trades_bytes_moved_for_memory():
    plans = [Plan(data=2, zero=zero) for zero in range(4)]
    moved, memory = zip(*((p.moved, p.memory) for p in priced(gpt(1), plans)), strict=True)
    assert all(less < memory[0] for less in memory[1:])
    assert math.isclose(moved[0], moved[1], rel_tol=0.01)
    assert moved[3] > moved[2]
