"""Finish, Agree, Update, Commit: clipping, schedules, what is not finite, who holds what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from meshwright.errors import UserCodeError
from tests.run.jobs import (
    Net,
    Points,
    alone,
    close,
    fresh,
    job,
    losses,
    mean_loss,
    on_ranks,
    sgd,
    step,
    torch_loop,
    weights,
)

ZERO = ["zero1,data=2", "zero2,data=3", "zero3,data=2"]


@pytest.mark.parametrize(
    ("plan", "limit"),
    [("data=1", 0.05), ("data=3", 100.0), ("zero1,data=2", 0.05), ("zero3,data=3", 0.05)],
)
def test_clipping_is_torchs(plan, limit):
    made = job(clip_norm=limit, optimizer=sgd)
    model = fresh(made)
    list(torch_loop(made, model, 3, clip=limit))

    def body(session):
        norms = [step(session).metrics.gradient_norm for _ in range(3)]
        return norms, weights(session)

    (norms, found), *others = on_ranks(made, plan, body)
    close(found, model.state_dict())
    assert all(n == pytest.approx(norms) for n, _ in others)
    assert (norms[0] > limit) == (limit < 1)


@pytest.mark.parametrize("plan", ["data=2", "pipeline=2", *ZERO])
def test_what_the_optimizer_does_not_hold_stays_and_counts_in_the_norm(plan):
    made = job(clip_norm=1e-3, optimizer=lambda m: torch.optim.SGD(m.down.parameters(), lr=1.0))
    model = fresh(made)
    before = {n: t.clone() for n, t in model.up.state_dict().items()}
    want = list(torch_loop(made, model, 3, clip=1e-3))
    (seen, found), *_ = on_ranks(made, plan, lambda s: (losses(s, 3), weights(s)))
    assert seen == pytest.approx(want)
    close(found, model.state_dict(), to=1e-7)
    assert all(torch.equal(found[f"up.{n}"], t) for n, t in before.items())


def _frozen():
    model = Net()
    model.up.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("plan", "only_trained"), [("data=2", False), ("zero1,data=2", True), ("zero3,data=3", False)]
)
def test_frozen_parameters_stay(plan, only_trained):
    def optimizer(model):
        held = [p for p in model.parameters() if p.requires_grad or not only_trained]
        return torch.optim.AdamW(held, lr=1e-2, eps=1e-6, weight_decay=0.1)

    made = job(model=_frozen, optimizer=optimizer)
    model = fresh(made)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    want = list(torch_loop(made, model, 3))
    (seen, found), *_ = on_ranks(made, plan, lambda s: (losses(s, 3), weights(s)))
    assert seen == pytest.approx(want)
    close(found, model.state_dict())
    assert torch.equal(found["up.weight"], before["up.weight"])


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=2", "pipeline=2"])
def test_groups_keep_their_settings(plan):
    def optimizer(model):
        return torch.optim.AdamW(
            [
                {"params": [model.up.weight, model.down.weight], "weight_decay": 0.3},
                {"params": [model.up.bias, model.down.bias], "lr": 0.05, "betas": (0.5, 0.6)},
            ],
            lr=1e-2,
            eps=1e-6,
        )

    made = job(optimizer=optimizer)
    model = fresh(made)
    list(torch_loop(made, model, 3))
    found, *_ = on_ranks(made, plan, lambda s: (losses(s, 3), weights(s))[1])
    close(found, model.state_dict())


SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "two": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
    "many": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_steps_once_a_step_whatever_the_micro_batches(name):
    made = job(schedule=SCHEDULES[name], optimizer=sgd)
    model = fresh(made)
    optimizer = made.optimizer(model)
    schedule = made.schedule(optimizer)
    want = []
    for _ in range(4):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    session = alone(made, "data=1,microbatches=3")
    assert [step(session).lr for _ in range(4)] == pytest.approx(want)


def test_a_schedule_that_needs_a_metric_is_refused():
    made = job(schedule=lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(UserCodeError, match=r"ReduceLROnPlateau.*metric.*LambdaLR"):
        alone(made)


def test_what_is_no_schedule_is_refused():
    with pytest.raises(UserCodeError, match=r"schedule\(optimizer\) returned NoneType"):
        alone(job(schedule=lambda optimizer: None))


class Blowing(Points):
    """Sample 7 of the data is not a number."""

    def __init__(self):
        super().__init__(24)
        self.x[7] = math.nan


def _step_with_nan(made):
    """Which of the first two steps meets sample 7."""
    session = alone(made, nonfinite="ignore")
    return next(k for k, loss in enumerate(losses(session, 2)) if math.isnan(loss))


@pytest.mark.parametrize("plan", ["data=1", "data=2", "zero3,data=2", "pipeline=2"])
def test_a_loss_that_is_not_finite_raises_and_leaves_the_weights(plan):
    made = job(data=Blowing)
    bad = _step_with_nan(made)

    def body(session):
        losses(session, bad)
        before = weights(session)
        parts = {n: t.clone() for n, t in session.worker.state.values.items()}
        with pytest.raises(UserCodeError, match=rf"the loss is nan in step {bad + 1}; nothing of"):
            step(session)
        for name, part in parts.items():
            assert torch.equal(part, session.worker.state.values[name]), name
        return before, weights(session)

    with pytest.raises(
        UserCodeError, match=rf"the loss is nan in step {bad + 1}; nothing of this step"
    ):
        on_ranks(made, plan, lambda s: losses(s, bad + 1))
    if plan == "data=1":
        session = alone(made)
        before, after = body(session)
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert session.step == bad


@pytest.mark.parametrize(("plan", "clip"), [("data=1", None), ("zero2,data=2", 1.0)])
def test_a_step_that_is_not_finite_can_be_skipped(plan, clip):
    made = job(
        data=Blowing, optimizer=sgd, clip_norm=clip,
        schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.5),
        model=lambda: Net(nn.BatchNorm1d(40)),
    )  # fmt: skip
    bad = _step_with_nan(made)

    def body(session):
        losses(session, bad)
        before, lr = weights(session), session.lr
        found = step(session).metrics
        after = weights(session)
        assert found.skipped
        assert math.isnan(found.loss)
        assert session.lr == lr
        finite = [step(session).metrics for _ in range(2 - bad)]
        assert session.step == 3
        assert all(torch.equal(before[n], after[n]) for n in before)
        return finite

    on_ranks(made, plan, body, nonfinite="skip")


def test_it_can_be_ignored_as_torch_does():
    session = alone(job(data=Blowing), nonfinite="ignore")
    losses(session, 2)
    assert not step(session).metrics.skipped
    assert any(torch.isnan(t).any() for t in weights(session).values())


def test_a_batch_in_which_nothing_counts_is_refused():
    def loss(model, batch):
        return mean_loss(model, batch), (batch["w"] * 0).sum()

    session = alone(job(loss=loss))
    with pytest.raises(UserCodeError, match=r"weight in step 1 is 0.0.*at least one sample"):
        step(session)
