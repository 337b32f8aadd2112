"""Plans over more axes than `data` equal one device: tensor, context, and their products."""

from __future__ import annotations

from functools import cache

import pytest

from tests.equal.cells import MODELS
from tests.equal.harness import Case, assert_equal

PLANS = (
    "tensor=2",
    "tensor=4",
    "tensor=2,microbatches=3",
    "data=2,tensor=2",
    "zero1,data=2,tensor=2",
    "zero2,data=2,tensor=2,microbatches=3",
    "zero3,data=2,tensor=2",
    "zero3,data=3,tensor=2,microbatches=3",
    "context=2",
    "data=2,context=2,microbatches=3",
    "zero3,data=2,context=2",
    "context=2,tensor=2",
    "zero2,data=2,context=2,tensor=2",
)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axes")
    return cache(lambda name: Case(MODELS[name](folder)))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", ["gpt", "gpt2", "llama"])
def test_a_transformer_equals_one_device(case, model, plan):
    assert_equal(case(model).verify(plan, steps=2))
