"""Every precision under every kind of plan: one device without its rounding, and with it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from meshwright.job import LossScale
from tests.equal.cells import MODELS, example
from tests.equal.harness import Case, assert_equal

PRECISIONS = ("fp16", "bf16-pure")
LAYOUTS = (
    "data=2",
    "data=3,microbatches=2",
    "zero1,data=2",
    "zero2,data=3,microbatches=2",
    "zero3,data=2",
    "zero3,data=4,shard=2",
    "data=2,tensor=2",
    "zero3,data=2,tensor=2,sequence=tensor",
    "context=2",
    "pipeline=2,microbatches=2",
    "pipeline=2,data=2,microbatches=2,zero1",
    "pipeline=2,microbatches=4,schedule=zb-h1",
)
SAMPLE = (("fp16", "pipeline=2,microbatches=2"), ("bf16-pure", "zero3,data=2"))


def plan_of(layout, precision):
    """The preset first."""
    items = layout.split(",")
    items.sort(key=lambda item: not item.startswith("zero"))
    return ",".join([*items, f"precision={precision}"])


@cache
def case(name="gpt"):
    return Case(MODELS[name](Path()))


@cache
def clipped():
    """A GPT whose head is its embedding, so that a pipeline's ends share it; clipped each step."""
    made = example("gpt").job(depth=2, width=32, context=16, batch=16)
    tied = lambda: example("gpt").GPT(2, 32, 16, 0.1, tied=True)  # noqa: E731
    return Case(replace(made, model=tied, clip_norm=0.05, loss_scale=LossScale(initial=4096.0)))


def holds(found, layout, precision):
    assert_equal(found.verify(plan_of(layout, precision), steps=3))
    outcome = found.rounded(plan_of(layout, precision))
    assert outcome["passed"], outcome
    return outcome


@pytest.mark.parametrize(("precision", "layout"), SAMPLE)
def test_a_precision_under_a_plan_is_one_device(precision, layout):
    holds(clipped(), layout, precision)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("precision", "layout"), sorted({*itertools.product(PRECISIONS, LAYOUTS)} - {*SAMPLE})
)
def test_every_precision_under_every_plan_is_one_device(precision, layout):
    holds(clipped(), layout, precision)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["gpt, dropout", "digits, dropout", "llama", "vit", "bert"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["data=2", "zero3,data=3"])
def test_other_models_in_every_precision(name, precision, layout):
    holds(case(name), layout, precision)
