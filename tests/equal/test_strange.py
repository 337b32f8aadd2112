"""Models that nobody here wrote rules for equal eager training on one device."""

from __future__ import annotations

from functools import cache

import pytest

from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.strange import STRANGE

SAMPLE = {
    "shared": "context=2",
    "fading": "data=2,tensor=2",
    "waves": "tensor=2",
    "complex_weights": "zero3,data=2,tensor=2",
}
PLANS = ["tensor=2", "data=2,tensor=2,microbatches=2", "zero3,data=2,tensor=2", "context=2",
         "data=2,context=2"]  # fmt: skip


@cache
def case(name):
    return Case(STRANGE[name]())


@pytest.mark.parametrize("name", SAMPLE)
def test_a_strange_model_equals_eager_and_every_op_has_a_rule(name):
    assert_equal(case(name).verify(SAMPLE[name], steps=2))
    assert unruled(case(name), SAMPLE[name]) == set()


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_model_equals_eager_under_every_plan(name, plan):
    assert_equal(case(name).verify(plan, steps=3))
