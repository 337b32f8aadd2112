"""Phases are the user's own loop: several losses in turn on one model, each its optimizer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from meshwright.run.data.samples import open_source
from meshwright.run.equality.measure import LAW
from meshwright.run.equality.verify import Trial, try_local
from meshwright.run.phased import PhasedWorker
from tests.run.duet import d_loss, duet, g_loss
from tests.run.jobs import fresh, on_ranks, step, weights

SAMPLE = ("zero1,data=2", "zero3,data=2,microbatches=2")
PLANS = (
    "data=1",
    "data=3",
    "data=2,microbatches=3",
    "zero2,data=3,microbatches=2",
    "zero3,data=4,shard=2",
    "tensor=2",
    "zero1,data=2,tensor=2",
    "zero3,data=2,tensor=2",
    "data=2,remat=full",
    "zero3,data=2,remat=budget:1GiB",
    "zero2,data=2,precision=bf16",
    "zero2,data=2,precision=fp16",
    "zero1,data=2,precision=bf16-pure",
)
OFFLOADS = ("zero2,data=2,microbatches=2,offload=host", "zero3,data=2,offload=disk")
KINDS = ("loss", "gradients", "weights", "optimizer")


def check(job, plan, steps=5):
    found = Plan.parse(plan)
    dtypes = ("float64", "float32") if found.short else ("float64",)
    for dtype in dtypes:
        outcome = try_local(Trial.of(job, found, found.ranks, dtype), steps)
        assert outcome["passed"], outcome
        if dtype == "float64":
            assert {outcome["law"][kind] for kind in KINDS} == {LAW}


@cache
def averaging():
    return duet(noisy=True, ema=0.9)


@pytest.mark.parametrize("plan", SAMPLE)
def test_phases_are_those_of_one_device(plan):
    check(averaging(), plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS)
def test_phases_are_those_of_one_device_in_every_layout(plan):
    check(averaging(), plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", OFFLOADS)
def test_phases_are_those_of_one_device_offloaded(plan):
    check(duet(noisy=True), plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", ["data=1", "zero2,data=2"])
def test_phases_run_in_the_order_that_is_given(plan):
    check(duet(order=("g", "d", "d")), plan)


def by_hand(job, steps, order):
    """The loop as everybody writes it: gradients of the other network are thrown away."""
    model = fresh(job).double()
    d = torch.optim.Adam(model.critic.parameters(), lr=2e-3)
    g = torch.optim.SGD(model.generator.parameters(), lr=0.1, momentum=0.9)
    falls = torch.optim.lr_scheduler.ExponentialLR(g, 0.5)
    source = open_source(job.data(), batch_size=job.batch_size, seed=job.seed)
    losses = []
    for phase, batch in zip(order * steps, source.batches(), strict=False):
        if len(losses) == steps:
            break
        tree = [t.double() for t in batch.tree]
        model.zero_grad()
        loss = d_loss(model, tree)[0] if phase == "d" else g_loss(model, tree)
        loss.backward()
        losses.append(loss.item())
        if phase == "d":
            nn.utils.clip_grad_norm_(model.critic.parameters(), 0.05)
            d.step()
        else:
            g.step()
            falls.step()
    return losses, model.state_dict()


def test_phases_are_the_usual_loop_by_hand():
    job, steps = duet(), 5
    want, after = by_hand(job, steps, ("d", "g"))

    def body(session):
        found = [step(session).metrics for _ in range(steps)]
        assert [m.phase for m in found] == ["d", "g", "d", "g", "d"]
        assert found[0].gradient_norm > 0.05  # else nothing was clipped
        assert found[1].gradient_norm is None
        return [m.loss for m in found], weights(session)

    losses, mine = on_ranks(job, "zero2,data=2", body, dtype=torch.float64)[0]
    assert losses == pytest.approx(want, rel=1e-6)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor.double(), after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", ["order", "state", "schedule"])
def test_a_wrong_turn_is_seen(wrong, monkeypatch):
    turn = PhasedWorker.turn

    def turned(self, phase):
        if wrong == "order":
            phase = "g" if phase == "d" else "d"
        turn(self, phase)
        if wrong == "state" and phase == "g":
            self.state = self.phases["d"][1]
        if wrong == "schedule":
            self.state.scheduler = None

    monkeypatch.setattr(PhasedWorker, "turn", turned)
    try:
        assert not try_local(Trial.of(duet(), Plan.parse("zero1,data=2"), 2, "float64"), 4)[
            "passed"
        ]
    except KeyError:
        assert wrong == "state"  # the other phase's optimizer has no such shards


@pytest.mark.parametrize("plan", ["pipeline=2,microbatches=2", "zero3,data=2,gather=step"])
def test_what_cuts_one_loss_is_refused(plan):
    with pytest.raises(PlanError, match="trains several in phases"):
        Trial.of(duet(), Plan.parse(plan), 2, "float64")
