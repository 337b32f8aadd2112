"""bf16 in a run: checkpoints go either way, evaluation and prediction compute as training does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from meshwright.plan.plan import Plan
from tests.run.jobs import (
    Net,
    Points,
    adamw,
    alone,
    fresh,
    job,
    losses,
    mean_loss,
    on_ranks,
    weighted_loss,
    weights,
)
from tests.run.test_persist import saved

BF16 = ",precision=bf16"


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def plain_losses(made, steps):
    """A torch loop under autocast over the same batches."""
    session = alone(made)
    model = fresh(made)
    optimizer = made.optimizer(model)
    found = []
    for at in range(steps):
        batch = session.worker.source.fetch(at, 0, made.batch_size, (0, made.batch_size)).tree
        with autocast():
            loss = made.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_a_run_is_an_autocast_loop():
    made = job(batch_size=16)  # a power of two: the loss times samples, and back, is exact
    assert losses(alone(made, "data=1" + BF16), 6) == plain_losses(made, 6)


@pytest.mark.parametrize(
    "plan", ["data=2", "zero1,data=2", "zero2,data=3", "zero3,data=2,microbatches=2"]
)
def test_so_it_is_on_ranks_to_rounding(plan):
    made = job(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    want = plain_losses(made, 6)
    for found in on_ranks(made, plan + BF16, lambda s: losses(s, 6)):
        assert found == pytest.approx(want, rel=2**-9)


@pytest.mark.parametrize("plan", ["data=1", "data=2"])
def test_the_door_eager_computes_in_it_too(plan):
    made = job()
    want = plain_losses(made, 4)
    for found in on_ranks(made, plan + BF16, lambda s: losses(s, 4), eager=True):
        assert found == pytest.approx(want, rel=2**-9)
        assert found != losses(alone(made), 4)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("zero3,data=2" + BF16, "data=2"),
        ("data=2", "zero2,data=3" + BF16),
        ("data=2" + BF16, "data=1"),
    ],
)
def test_a_checkpoint_of_either_precision_goes_on_in_the_other(first, then, tmp_path):
    made = job()
    saved(made, first, tmp_path, steps=5)
    held = on_ranks(made, first, lambda s: (losses(s, 5), weights(s))[1])[0]

    def go_on(session):
        assert session.resume(tmp_path) is not None
        return weights(session), losses(session, 3)

    found, after = on_ranks(made, then, go_on)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    straight = losses(alone(made), 8)[5:]
    assert after == pytest.approx(straight, rel=2**-6)


def held_out():
    return Points(25, seed=9)


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=2"])
def test_evaluation_and_prediction_compute_in_it(plan):
    made = job(loss=weighted_loss, evaluation=held_out, batch_size=25)
    data = held_out()
    batch = {"x": data.x, "y": data.y, "w": data.w}
    model = fresh(made).eval()
    with torch.no_grad(), autocast():
        total, weight, _ = weighted_loss(model, batch)
        logits = model(data.x)

    def body(session):
        rows = session.predict(data, lambda model, batch: model(batch["x"]))
        return session.evaluate()["loss"], rows

    for loss, rows in on_ranks(made, plan + BF16, body):
        assert loss == pytest.approx(float(total / weight), rel=1e-6)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, logits)


def test_running_statistics_stay_float32():
    made = job(model=lambda: Net(nn.BatchNorm1d(40)), loss=mean_loss, optimizer=adamw)
    session = alone(made, "data=1" + BF16)
    want = plain_losses(made, 4)
    assert losses(session, 4) == pytest.approx(want, rel=1e-5)
    buffers = {n: t for n, t in session.worker.state.values.items() if n.startswith("buffer/")}
    assert buffers["buffer/middle.running_mean"].dtype == torch.float32
    assert buffers["buffer/middle.running_mean"].abs().max() > 0


def test_a_bill_follows_the_dtypes():
    """Half as much is saved for the backward, but for what norms and losses keep in float32."""
    from meshwright.run.describe import describe_build

    made = job(batch_size=48)
    saved_ = {}
    for plan in ("data=1", "data=1" + BF16):
        session = alone(made, plan)
        bill = describe_build(session.build, session.take().micros)["memory"][0]["parts"]
        saved_[plan] = bill
    wide, short = saved_.values()
    for part in ("weights", "gradients", "optimizer"):
        assert wide[part] == short[part]
    assert 0 < short["saved activations"] < wide["saved activations"]


def test_plans_that_differ_in_precision_are_two():
    assert Plan.parse("data=2,precision=bf16") == replace(Plan(data=2), precision="bf16")
    assert Plan.parse("data=2,precision=bf16").text() == "data=2,precision=bf16"
