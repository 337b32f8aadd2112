"""The average of the weights is torch's, under every plan that keeps it in shards."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from meshwright.run.average import Average
from tests.equal.cells import example
from tests.equal.harness import Case, assert_equal

LAYOUTS = (
    "data=1",
    "data=3,microbatches=2",
    "zero1,data=2",
    "zero2,data=3,microbatches=2",
    "zero3,data=2,microbatches=2",
    "zero3,data=4,shard=2",
    "tensor=2",
    "zero1,data=2,tensor=2",
    "zero3,data=2,tensor=2",
    "pipeline=2,microbatches=2",
    "zero1,pipeline=2,data=2,microbatches=2",
    "pipeline=2,replicas=2-1,microbatches=2",
    "zero2,data=2,precision=bf16",
    "zero1,data=2,offload=host",
    "data=2,offload=optimizer:disk",
    "zero1,data=2,offload=disk",
    "zero3,data=2,microbatches=2,offload=disk",
    "zero2,data=2,microbatches=2,offload=params:disk",
    "zero2,data=2,pipeline=2,microbatches=2,offload=disk",
    "tensor=2,offload=disk",
)
SAMPLE = (
    "zero1,data=2",
    "zero3,data=2,tensor=2",
    "zero1,pipeline=2,data=2,microbatches=2",
    "zero1,data=2,offload=disk",
)


@cache
def case():
    return Case(replace(example("gpt").job(depth=1, width=16, context=8, batch=12), ema=0.9))


def check(plan):
    report = case().verify(plan, steps=4)
    assert_equal(report)
    assert report.worst["weights"].error <= 1e-12


@pytest.mark.parametrize("plan", SAMPLE)
def test_the_average_is_torchs(plan):
    check(plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", [p for p in LAYOUTS if p not in SAMPLE])
def test_the_average_is_torchs_in_every_layout(plan):
    check(plan)


@pytest.mark.parametrize("wrong", ["decay", "late", "first"])
def test_a_wrong_average_is_seen(wrong, monkeypatch):
    take = Average.take

    def taken(self, shards):
        if wrong == "decay":
            self.decay = 0.8
        if wrong == "first" and not self.steps:
            self.steps = 1  # the weights that training began with count
        if wrong == "late" and self.steps == 2:
            return
        take(self, shards)

    monkeypatch.setattr(Average, "take", taken)
    report = case().verify("zero1,data=2", steps=4)
    assert not report.passed
    assert report.worst["weights"].tensor.startswith("ema/")
