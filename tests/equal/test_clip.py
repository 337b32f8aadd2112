"""The norm that gradients are clipped by is that of one device, however they lie."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from meshwright.comm.local import LocalWorld
from meshwright.run.step import StepWork
from tests.equal.cells import example
from tests.equal.harness import Case
from tests.run.jobs import fresh

CLIP = 0.05
LAYOUTS = (
    "data=1",
    "data=3,microbatches=2",
    "zero1,data=2",
    "zero2,data=3,microbatches=2",
    "zero3,data=2,microbatches=2",
    "zero3,data=4,shard=2",
    "tensor=2",
    "zero3,data=2,tensor=2",
    "data=2,tensor=2,sequence=tensor",
    "context=2",
    "pipeline=2,microbatches=2",
    "pipeline=3,microbatches=3",
    "zero1,pipeline=2,data=2,microbatches=2",
    "pipeline=2,tensor=2,microbatches=2",
    "pipeline=2,replicas=2-1,microbatches=2",
)
SAMPLE = ("zero2,data=3,microbatches=2", "pipeline=2,tensor=2,microbatches=2")


@cache
def case():
    """A GPT whose head is its embedding: under a pipeline the first and last stage share it."""
    made = example("gpt").job(depth=3, width=32, context=16, batch=12)
    tied = lambda: example("gpt").GPT(3, 32, 16, tied=True)  # noqa: E731
    return Case(replace(made, model=tied, clip_norm=CLIP, optimizer=sgd))


def sgd(model):
    """The weights move by the clipped gradients themselves."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


@cache
def expected():
    """What torch makes of it: the norm, and the weights after the step."""
    job, model = case().job, fresh(case().job).double()
    batch = case().source().fetch(0, 0, 12, (0, 12)).tree
    job.loss(model, batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    sgd(model).step()
    return float(norm), dict(model.named_parameters())


def taken(plan):
    """(norm, state) on every rank after a step in float64."""
    build = case().build(plan)
    workers = case().workers(build)

    def step(worker):
        fetched = yield from worker.agree_on_shapes(worker.fetch(0))
        metrics, _ = yield from worker.step(fetched, None)
        return metrics.gradient_norm, worker.state

    return build, LocalWorld(len(workers)).perform([step(worker) for worker in workers])


def holds(plan):
    norm, weights = expected()
    assert norm > 2 * CLIP
    build, found = taken(plan)
    for each, state in found:
        assert each == pytest.approx(norm, rel=1e-10)
        for name, shard in state.shards.items():
            if shard.shape == weights[name].shape:
                torch.testing.assert_close(shard.data, weights[name].data, rtol=1e-10, atol=1e-12)
    if build.plan.zero == 0 and build.plan.tensor == 1:
        assert any(
            shard.shape == weights[n].shape for _, s in found for n, shard in s.shards.items()
        )


@pytest.mark.parametrize("plan", SAMPLE)
def test_the_norm_counts_every_element_once(plan):
    holds(plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", sorted({*LAYOUTS} - {*SAMPLE}))
def test_the_norm_counts_every_element_once_under_every_layout(plan):
    holds(plan)


def test_a_norm_that_counts_replicas_is_another(monkeypatch):
    """The law above sees what it forbids."""
    squares = StepWork._squares

    def all_of_them(work, values, names):
        monkeypatch.setattr(work.state, "counted", frozenset(work.state.trained))
        return squares(work, values, names)

    monkeypatch.setattr(StepWork, "_squares", all_of_them)
    _, found = taken(SAMPLE[1])
    assert found[0][0] > 1.01 * expected()[0]
