"""Families that the rules were not developed against equal one device, or are refused with a line.

`make test` runs three cells, of what their first run lacked; `make matrix` runs every cell.
"""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.errors import NotTraceable, PlanError
from tests.equal import unseen_more, unseen_other
from tests.equal.harness import Case, assert_equal, unruled

FAMILIES = {**unseen_other.UNSEEN, **unseen_more.UNSEEN}
BATCH_NORMED = (*unseen_other.BATCH_NORMED, *unseen_more.BATCH_NORMED)
REFUSED = {
    "detr": r"loss_for_object_detection\.py:\d+: the model takes a tensor's values.*custom_op",
    "qwen2_vl": r"vision_utils\.py:\d+: the model reads a tensor's value",
    "encodec": r"modeling_encodec\.py:\d+: the model reads a tensor's value",
}
"""What no program of fixed shapes can express, and where it is said."""
PLANS = ("data=2", "tensor=2", "data=2,tensor=2,microbatches=3", "zero3,data=2,tensor=2")
SAMPLE = (
    ("llava", "tensor=2"),
    ("sew", "tensor=2"),
    ("graph", "zero3,data=2,tensor=2"),
)


@pytest.fixture(scope="module")
def case():
    """Family -> its case; kept for the cells of one family, which follow each other."""
    return cache(lambda name: Case(FAMILIES[name]()))


def equals(made, name, plan):
    if name in BATCH_NORMED and "microbatches" in plan:
        with pytest.raises(PlanError, match=r"batch norm.*microbatches="):
            made.verify(plan, steps=1)
        return
    assert unruled(made, plan) == set()
    assert_equal(made.verify(plan, steps=2))


@pytest.mark.parametrize(("name", "plan"), SAMPLE)
def test_an_unseen_family_equals_one_device(case, name, plan):
    equals(case(name), name, plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_every_unseen_family_equals_one_device(case, name, plan):
    equals(case(name), name, plan)


@pytest.mark.matrix
@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_expressed_is_refused_with_its_line(case, name):
    with pytest.raises(NotTraceable, match=REFUSED[name] + ".*--eager"):
        case(name).verify("data=2", steps=1)
