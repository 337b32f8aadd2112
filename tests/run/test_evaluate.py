"""Evaluation and prediction: weighted exactly, over any number of ranks, in evaluation mode."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from meshwright.errors import UsageError, UserCodeError
from tests.run.jobs import Net, Points, alone, fresh, job, losses, on_ranks, weighted_loss


def held_out(count):
    return lambda: Points(count, seed=9)


def by_hand(made, count):
    """What one device computes over the whole held-out set at once."""
    model = fresh(made).eval()
    data = Points(count, seed=9)
    batch = {"x": data.x, "y": data.y, "w": data.w}
    with torch.no_grad():
        total, weight, metrics = weighted_loss(model, batch)
    right, counted = metrics["accuracy"]
    return {"loss": float(total / weight), "accuracy": float(right / counted)}


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        ("data=1", 31),
        ("data=3", 24),
        ("data=3", 25),
        ("data=3", 2),
        ("zero3,data=2", 13),
        ("pipeline=2", 31),
        ("pipeline=2,data=2,schedule=zb-v,microbatches=2", 13),
    ],
)
def test_a_short_last_batch_counts_by_its_samples(plan, count):
    made = job(loss=weighted_loss, evaluation=held_out(count))
    want = by_hand(made, count)
    for found in on_ranks(made, plan, lambda s: s.evaluate()):
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert found["accuracy"] == pytest.approx(want["accuracy"], rel=1e-6)


def _normed():
    return Net(nn.Sequential(nn.BatchNorm1d(40), nn.Dropout(0.5)))


@pytest.mark.parametrize("plan", ["data=2", "zero3,data=3", "pipeline=2"])
def test_batch_norm_and_dropout_are_in_evaluation_mode(plan):
    made = job(loss=weighted_loss, evaluation=held_out(20), model=_normed)

    def body(session):
        losses(session, 2)
        before = {n: t.clone() for n, t in session.worker.state.values.items()}
        found = session.evaluate()
        for name, tensor in before.items():
            assert torch.equal(session.worker.state.values[name], tensor), name
        model = session.module()
        again = session.evaluate()
        return found, again, model, losses(session, 1)

    (found, again, model, _), *others = on_ranks(made, plan, body)
    assert found == again
    assert all(o[0] == found for o in others)
    data = Points(20, seed=9)
    with torch.no_grad():
        total, weight, _ = weighted_loss(model.eval(), {"x": data.x, "y": data.y, "w": data.w})
    assert found["loss"] == pytest.approx(float(total / weight), rel=1e-5)


def test_evaluating_changes_nothing_of_training():
    made = job(evaluation=held_out(20), model=_normed)
    plain = losses(alone(made), 4)
    session = alone(made)
    seen = []
    for _ in range(4):
        seen += losses(session, 1)
        session.evaluate()
    assert seen == plain


@pytest.mark.parametrize(
    ("plan", "count"),
    [("data=2", 25), ("zero3,data=3", 2), ("pipeline=2,data=2", 25), ("pipeline=3", 2)],
)
def test_predictions_come_in_order_from_all_ranks(plan, count):
    made = job(model=_normed)
    data = Points(count, seed=9)

    def forward(model, batch):
        logits = model(batch["x"])
        return {"logits": logits, "best": (logits.argmax(-1), batch["y"])}

    def body(session):
        losses(session, 1)
        return session.predict(data, forward), session.module()

    (first, model), *others = on_ranks(made, plan, body)
    with torch.no_grad():
        want = model.eval()(data.x)
    torch.testing.assert_close(first["logits"], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(first["best"][0], first["logits"].argmax(-1))
    assert torch.equal(first["best"][1], data.y)
    assert all(torch.equal(o[0]["logits"], first["logits"]) for o in others)


def test_what_a_prediction_must_be():
    session = alone(job())
    with pytest.raises(
        UserCodeError, match=r"predict's function returned \(\).*one row per sample"
    ):
        session.predict(Points(5), lambda model, batch: model(batch["x"]).mean())
    with pytest.raises(UserCodeError, match="empty"):
        session.predict([], lambda model, batch: model(batch["x"]))


def test_functions_made_anew_are_not_mistaken_for_each_other():
    """A lambda's id may be that of one that is gone."""
    session = alone(job())
    data = Points(4)
    for scale in range(6):
        found = session.predict(data, lambda model, batch, k=scale: model(batch["x"]) * k)
        gc.collect()
        if scale == 1:
            once = found
        if scale > 1:
            torch.testing.assert_close(found, once * scale)


def test_evaluation_needs_data():
    session = alone(job())
    with pytest.raises(UsageError, match=r"Job\(evaluation=lambda"):
        session.evaluate()
    with pytest.raises(UserCodeError, match="empty"):
        session.evaluate([])


def test_a_stream_is_evaluated_as_often_as_asked():
    """An evaluation set that can be read once only is made anew by its factory."""

    def stream():
        data = Points(70, seed=9)
        for start in range(0, 70, 12):
            part = slice(start, min(70, start + 12))
            yield {"x": data.x[part], "y": data.y[part], "w": data.w[part]}

    made = job(loss=weighted_loss, evaluation=stream)
    session = alone(made)
    first, second = session.evaluate(), session.evaluate()
    assert first == second
    assert first["loss"] == pytest.approx(by_hand(made, 70)["loss"], rel=1e-6)


@pytest.mark.parametrize("plan", ["data=1", "data=2", "pipeline=2"])
def test_nothing_that_counts_is_told(plan):
    def loss(model, batch):
        total, weight, _ = weighted_loss(model, batch)
        return total * 0, weight * 0

    with pytest.raises(UserCodeError, match=r"no samples \(or none that count\)"):
        on_ranks(job(loss=loss, evaluation=held_out(5)), plan, lambda s: s.evaluate())
