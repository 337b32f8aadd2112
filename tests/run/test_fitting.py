"""Plans that need less: each once, legal, priced by the bill, the quickest first."""

from __future__ import annotations

import pytest

from meshwright.plan.plan import Plan
from meshwright.run.bill import bill_of
from meshwright.run.fitting import candidates, fitting, out_of_memory
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare
from tests.run.hungry import job


def test_each_change_alone_then_together():
    found = [plan.text() for plan in candidates(Plan(data=2), 8)]
    assert found[:6] == [
        "zero1,data=2", "zero2,data=2", "zero3,data=2", "data=2,remat=selective",
        "data=2,remat=full", "data=2,microbatches=2",
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert "data=2" not in found
    assert "zero3,data=2,microbatches=4,remat=full,offload=disk" in found
    assert all(plan.zero == 0 for plan in candidates(Plan(data=1), 8))


def small():
    return job(width=128, depth=6, batch=512)


@pytest.mark.matrix
def test_those_that_fit_come_by_predicted_time_and_are_what_their_bill_says():
    made, plan = small(), Plan.parse("data=1")
    build = prepare(made, plan, 1)
    needed = bill_of(build, first_micros(build))[0]["peak"]
    own, found = fitting(made, plan, needed - 1)
    assert own.memory == needed
    assert {fit.plan.text() for fit in found} >= {"data=1,remat=full", "data=1,microbatches=2"}
    assert [fit.seconds for fit in found] == sorted(fit.seconds for fit in found)
    for fit in found:
        other = prepare(made, fit.plan, 1)
        assert max(e["peak"] for e in bill_of(other, first_micros(other))) == fit.memory < needed
    again = next(fit for fit in found if fit.plan.text() == "data=1,remat=full")
    assert 1.05 < again.seconds / own.seconds < 1.5


def test_what_does_not_fit_is_told_by_part_with_what_does():
    made, plan = small(), Plan.parse("data=1")
    build = prepare(made, plan, 1)
    (entry,) = bill_of(build, first_micros(build))
    text = out_of_memory(made, plan, entry, entry["peak"] - 1, "here")
    assert text.startswith("plan data=1 needs ")
    assert " on rank 0 (saved activations " in text
    assert " are free here; " in text
    assert "% time)" in text
    assert text.count(" needs ") == 4
    assert out_of_memory(made, plan, entry, 1, "here").endswith(
        "no plan near it fits: start more ranks, or use a smaller model or batch"
    )


def test_no_more_plans_are_looked_at_than_there_is_time_for():
    own, found = fitting(small(), Plan.parse("data=1"), 2**40, patience=0.0)
    assert own is not None
    assert found == []
