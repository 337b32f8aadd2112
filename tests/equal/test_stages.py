"""Odd models cut into stages equal one device, whatever crosses, is shared or is not there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from tests.equal import odd
from tests.equal.harness import Case, assert_equal
from tests.equal.stages import STAGED, counted_twice, middle

STEPS = 2
ORDERS = ("schedule=1f1b,microbatches=3", "schedule=zb-h1,microbatches=2")
BESIDE = ("zero3,data=2,", "zero1,data=2,", "tensor=2,", "remat=full,")


@cache
def case(name):
    return Case(STAGED[name][0]())


def plan(name, text):
    """The plan, cut where the table says."""
    return replace(Plan.parse(text), cuts=STAGED[name][1])


def text(name, order, beside=""):
    return f"{beside}pipeline={len(STAGED[name][1]) + 1},{order}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", STAGED)
def test_an_odd_model_equals_one_device(name, order):
    assert_equal(case(name).verify(plan(name, text(name, order)), STEPS))


@pytest.mark.matrix
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("order", [*ORDERS, "schedule=gpipe,microbatches=3"])
@pytest.mark.parametrize("name", STAGED)
def test_an_odd_model_equals_one_device_over_other_axes(name, order, beside):
    assert_equal(case(name).verify(plan(name, text(name, order, beside)), STEPS))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "plan_",
    [
        "pipeline=2,schedule=zb-h1",
        "zero2,data=2,pipeline=2,schedule=1f1b",
        "pipeline=3,schedule=gpipe,remat=full",
    ],
)
@pytest.mark.parametrize("name", sorted(set(odd.ODD) - {"batch norm 1d, cumulative"}))
def test_other_odd_models_equal_one_device(name, plan_):
    """Cut by cost."""
    micros = 1 if "batch norm" in name else 2
    assert_equal(Case(odd.ODD[name]()).verify(f"{plan_},microbatches={micros}", STEPS))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("microbatches", [3, 8])
def test_micro_batches_that_do_not_divide_the_batch(schedule, microbatches):
    made = Case(odd.job(middle, batch=10))
    plan_ = f"pipeline=2,schedule={schedule},microbatches={microbatches}"
    assert_equal(made.verify(plan_, STEPS))


REFUSED = {
    "more stages than places": ("pipeline=4,schedule=zb-v,microbatches=2", middle, "8 stages, but"),
    "fewer samples than micro-batches": (
        "pipeline=2,schedule=1f1b,microbatches=13", middle, "microbatches=13 splits batch_size=12"),
    "no schedule of that name": ("pipeline=2,schedule=1f2b", middle, "schedule=1f2b"),
    "no chunks to interleave": ("pipeline=2,schedule=interleaved", middle, "virtual=2 or more"),
    "batch norm's samples are split": (
        "pipeline=2,schedule=1f1b,microbatches=3",
        lambda: odd.Plain(odd.nn.BatchNorm1d(32)), "batch norm.*microbatches=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_check_refuses(name):
    plan_, model, why = REFUSED[name]
    with pytest.raises(PlanError, match=why):
        Case(odd.job(model)).verify(plan_, 1)


def test_a_module_that_changes_its_buffers_at_two_stages_is_refused():
    made = Case(odd.job(counted_twice))
    asked = Plan.parse("pipeline=2,schedule=1f1b,microbatches=2")
    with pytest.raises(
        PlanError, match=r"updates buffer parts\.1\.\w+, which stages \[0, 1\] share"
    ):
        made.verify(replace(asked, cuts=("parts.2",)), 1)
    assert_equal(made.verify(replace(asked, cuts=("parts.4",)), STEPS))
