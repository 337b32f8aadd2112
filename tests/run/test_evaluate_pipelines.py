"""Evaluation and prediction under pipelines: forwards alone, their results on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.run.jobs import Net, Points, fresh, job, losses, on_ranks, weighted_loss

PLANS = (
    "zero3,data=2,pipeline=2,microbatches=2",
    "pipeline=2,schedule=zb-v,microbatches=2",
    *(
        pytest.param(plan, marks=pytest.mark.matrix)
        for plan in (
            "pipeline=2,microbatches=2",
            "pipeline=3,schedule=zb-h1,microbatches=2",
            "pipeline=2,virtual=2,microbatches=3",
        )
    ),
)


def deep():
    """Dropout and a norm, enough modules for four stages."""
    return Net(
        nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.Dropout(0.5), nn.Linear(40, 40))
    )


def held_out(count):
    return lambda: Points(count, seed=9)


def by_hand(model, count):
    data = Points(count, seed=9)
    with torch.no_grad():
        total, weight, metrics = weighted_loss(
            model.eval(), {"x": data.x, "y": data.y, "w": data.w}
        )
    right, counted = metrics["accuracy"]
    return {"loss": float(total / weight), "accuracy": float(right / counted)}


@pytest.mark.parametrize("count", [25, pytest.param(2, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("plan", PLANS)
def test_every_rank_is_told_the_same(plan, count):
    made = job(loss=weighted_loss, evaluation=held_out(count), model=deep)
    want = by_hand(fresh(made), count)
    for found in on_ranks(made, plan, lambda s: s.evaluate()):
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert found["accuracy"] == pytest.approx(want["accuracy"], rel=1e-5)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_evaluating_changes_nothing_of_training(plan):
    made = job(loss=weighted_loss, evaluation=held_out(20), model=deep)

    def body(session):
        return [(losses(session, 1), session.evaluate())[0] for _ in range(3)]

    plain = on_ranks(made, plan, lambda s: [losses(s, 1) for _ in range(3)])
    assert on_ranks(made, plan, body) == plain


@pytest.mark.parametrize("plan", PLANS)
def test_predictions_reach_every_rank_whatever_stage_makes_them(plan):
    """The last stage's rows, the first one's, and what is only loaded."""
    made = job(model=deep)
    data = Points(25, seed=9)

    def forward(model, batch):
        hidden = torch.tanh(model.up(batch["x"]))
        logits = model.down(model.middle(hidden))
        return {"logits": logits, "hidden": hidden, "best": (logits.argmax(-1), batch["y"])}

    def body(session):
        losses(session, 1)
        return session.predict(data, forward), session.module()

    found = on_ranks(made, plan, body)
    first, model = found[0]
    with torch.no_grad():
        hidden = torch.tanh(model.eval().up(data.x))
        logits = model(data.x)
    torch.testing.assert_close(first["logits"], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["hidden"], hidden, rtol=1e-5, atol=1e-5)
    assert torch.equal(first["best"][1], data.y)
    for other, _ in found[1:]:
        assert torch.equal(other["logits"], first["logits"])
        assert torch.equal(other["hidden"], first["hidden"])
        assert torch.equal(other["best"][0], first["best"][0])


def test_batch_norm_evaluates_with_the_statistics_of_its_stage():
    def normed():
        return Net(nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 40)))

    made = job(loss=weighted_loss, evaluation=held_out(20), model=normed, normalize_over=4)

    def body(session):
        losses(session, 2)
        return session.evaluate(), session.module()

    (found, model), *others = on_ranks(made, "pipeline=2,microbatches=3", body)
    assert found["loss"] == pytest.approx(by_hand(model, 20)["loss"], rel=1e-5)
    assert all(other == found for other, _ in others)
