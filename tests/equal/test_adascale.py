"""AdaScale is an eager loop over a batch's slices, whichever ranks and micro-batches they are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.errors import PlanError, UserCodeError
from meshwright.job import AdaScale, LossScale
from meshwright.plan.plan import Plan
from meshwright.run.equality.verify import Trial, try_local
from meshwright.run.optimizer.adascale import Gains
from meshwright.run.step import StepWork
from tests.equal.cells import example
from tests.equal.harness import Case, assert_equal
from tests.run.duet import duet
from tests.run.jobs import Net, job, mean_loss, weighted_loss

SAMPLE = ("data=4", "zero2,data=2,microbatches=2")
LAYOUTS = (
    "zero3,data=2,tensor=2,microbatches=4",
    "data=2,pipeline=2,microbatches=2",
    "data=1,microbatches=4",
    "data=2,microbatches=2",
    "data=2,microbatches=4",
    "data=3,microbatches=4",
    "zero1,data=2,microbatches=2",
    "zero1,data=2,microbatches=2,reduce=microbatch",
    "zero3,data=2,microbatches=4,reduce=step",
    "zero3,data=2,microbatches=4,gather=step",
    "zero3,data=4",
    "zero3,data=2,microbatches=2",
    "zero3,data=2,microbatches=4",
    "zero3,data=4,shard=2",
    "data=2,tensor=2,microbatches=2",
    "zero1,data=2,tensor=2,microbatches=2,sequence=tensor",
    "data=2,context=2,microbatches=2",
    "data=2,microbatches=2,remat=full",
    "zero2,data=2,microbatches=2,remat=selective",
    "zero3,data=2,microbatches=2,remat=budget:1GiB",
    "data=2,microbatches=2,offload=host",
    "zero2,data=2,microbatches=2,offload=disk",
    "zero3,data=4,offload=host",
    "pipeline=2,microbatches=4",
    "pipeline=2,microbatches=4,remat=full",
    "pipeline=2,replicas=2-1,microbatches=4",
    "zero1,data=2,pipeline=2,microbatches=2,schedule=zb-h1",
    "zero3,data=2,pipeline=2,microbatches=2",
    "data=2,microbatches=2,precision=bf16",
    "zero2,data=2,microbatches=2,precision=fp16",
)


def groups(model):
    """Matrices and vectors, whose gains differ."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    found = [{"params": matrices}, {"params": vectors, "lr": 0.02}]
    return torch.optim.SGD(found, lr=0.1, momentum=0.9)


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@cache
def case():
    made = example("gpt").job(depth=1, width=16, context=8, batch=12, dropout=0.1)
    rule = AdaScale(scale=4, smoothing=0.5)
    more = {"optimizer": groups, "schedule": decaying, "clip_norm": 1.0, "ema": 0.9}
    return Case(replace(made, adascale=rule, **more))


def check(plan):
    made = case()
    if Plan.parse(plan).offloads:  # beside which this version keeps no average
        made = Case(replace(made.job, ema=None))
    assert_equal(made.verify(plan, steps=4))


@pytest.mark.parametrize("plan", SAMPLE)
def test_adascale_is_that_of_one_device(plan):
    check(plan)
    gains = [snapshot.gain for snapshot in case().reference(case().build(plan)).seen]
    assert all(1.01 < gain < 3.99 for gain in gains)  # between the ends, where all is seen
    assert len(set(gains)) == 4


@pytest.mark.matrix
@pytest.mark.parametrize("plan", LAYOUTS)
def test_adascale_is_that_of_one_device_in_every_layout(plan):
    check(plan)


LATER = [pytest.param(wrong, marks=pytest.mark.matrix) for wrong in ("slices", "late", "schedule")]


@pytest.mark.parametrize("wrong", ["term", "rate", *LATER])
def test_a_wrong_adascale_is_seen(wrong, monkeypatch):
    """A term left out, S not squared, averages a step late, rates or schedule as without."""
    judged, scaled, applied = Gains.judged, Gains.scaled, StepWork._applied

    def other(self, totals, divisor):
        if wrong == "term":
            totals = {**totals, "slices/1": 0.0}
        if wrong == "slices":
            totals = {n: t / 4 if n.startswith("slices/") else t for n, t in totals.items()}
        found = judged(self, totals, divisor)
        return replace(found, means=self.means or found.means) if wrong == "late" else found

    def once(self):
        before = self.gains
        self.state.gains = self.gains = None
        applied(self)
        self.state.gains = self.gains = before

    monkeypatch.setattr(Gains, "judged", other)
    if wrong == "rate":
        flat = {"means": (1.0, 1.0), "variances": (0.0, 0.0)}
        monkeypatch.setattr(Gains, "scaled", lambda s, o: scaled(replace(s, **flat), o))
    if wrong == "schedule":
        monkeypatch.setattr(StepWork, "_applied", once)
    report = case().verify("zero2,data=2,microbatches=2", steps=4)
    assert not report.passed


@pytest.mark.parametrize("plan", ["zero3,data=2,microbatches=2"])
def test_what_counts_is_that_of_all_slices(plan):
    """A loss that gives its own weight: tokens are as many as they are."""
    made = job(
        loss=lambda model, batch: weighted_loss(model, batch)[:2],
        optimizer=groups,
        adascale=AdaScale(4),
    )
    assert_equal(Case(made).verify(plan, steps=3))


def masked(model, batch):
    """A mean over the samples that count, whose loss does not say how many these are."""
    labels = torch.where(batch["w"] > 0, batch["y"], -100)
    return F.cross_entropy(model(batch["x"]), labels)


def test_a_count_that_differs_between_slices_is_refused():
    made = Case(job(loss=masked, optimizer=groups, adascale=AdaScale(4)))
    with pytest.raises(UserCodeError, match=r"in step 1 the slices of adascale differ in what .*"):
        made.verify("data=2,microbatches=2", steps=1)
    assert_equal(made.verify("data=2,microbatches=4", steps=2))  # each is a micro-batch then


def decayed(model, batch):
    return mean_loss(model, batch) + 0.01 * sum(p.square().sum() for p in model.parameters())


def paired(model, batch):
    found = F.normalize(model(batch["x"]), dim=1)
    return (found @ found.t()).square().mean()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (decayed, "what .* makes does not come of samples one by one"),
        (paired, r"mixes the samples of ranks \(all_gather\)"),
        (mean_loss, r"mixes the samples of ranks \(all_reduce\)"),
    ],
)
def test_what_mixes_samples_needs_slices_that_are_microbatches(loss, why):
    norm = loss is mean_loss
    made = Case(
        job(
            loss=loss,
            model=(lambda: Net(nn.BatchNorm1d(40))) if norm else Net,
            optimizer=groups,
            adascale=AdaScale(4),
            normalize_over=6 if norm else None,
        )
    )
    with pytest.raises(PlanError, match=rf"{why}.*; use microbatches=4, each a slice"):
        made.verify("data=2,microbatches=2", steps=1)
    if not norm:
        assert_equal(made.verify("data=2,microbatches=4", steps=2))


@pytest.mark.matrix
@pytest.mark.parametrize("plan", ["zero1,data=2,microbatches=2", "zero3,data=2,microbatches=4"])
def test_each_phase_has_its_own(plan):
    made = duet(noisy=False, adascale=AdaScale(4))
    outcome = try_local(Trial.of(made, Plan.parse(plan), 2, "float64"), 5)
    assert outcome["passed"], outcome


@pytest.mark.matrix
def test_overflows_are_left_out():
    made = Case(replace(case().job, loss_scale=LossScale(initial=2.0**30)))
    assert made.rounded("data=2,microbatches=2,precision=fp16", steps=6)["passed"]
