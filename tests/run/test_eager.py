"""The door `--eager`: the user's code as it is, in the same run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meshwright as mw
from meshwright.errors import PlanError, UserCodeError
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
    weighted_loss,
    weights,
)


@pytest.mark.parametrize("plan", ["data=1", "data=3", "data=2,microbatches=5"])
@pytest.mark.parametrize("changes", [{}, {"loss": weighted_loss, "optimizer": sgd}])
def test_trains_as_a_plain_loop_does(plan, changes):
    made = job(**changes)
    model = fresh(made)
    want = list(torch_loop(made, model, 4))
    found = on_ranks(made, plan, lambda s: (losses(s, 4), weights(s)), eager=True)
    for seen, _ in found:
        assert seen == pytest.approx(want, rel=1e-5)
    close(found[0][1], model.state_dict())


class Untraceable(nn.Module):
    """Prints, reads values, and makes shapes that depend on them."""

    def forward(self, x):
        print(f"largest {x.abs().max().item():.3f}")  # noqa: T201 - what the door is for
        if x.sum() > 1000:
            return x
        kept = x[x[:, 0] > -1000]
        return kept + x.mean() * 0


@pytest.mark.parametrize("plan", ["data=1", "data=2"])
def test_what_cannot_be_traced_runs(plan, capsys):
    made = job(model=lambda: Net(Untraceable()), evaluation=Points)
    plain = losses(alone(job()), 3)

    def body(session):
        return losses(session, 3), session.evaluate()

    for seen, found in on_ranks(made, plan, body, eager=True):
        assert seen == pytest.approx(plain, rel=1e-5)
        assert found["loss"] > 0
    assert "largest" in capsys.readouterr().out


class Reaching(Net):
    """A layer that only samples with a large first feature reach, and one that none does."""

    def __init__(self):
        super().__init__()
        self.seldom = nn.Linear(3, 3)
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        logits = super().forward(x)
        rare = x[:, 0] > 1.5
        if rare.any():
            logits = logits + self.seldom(logits) * rare[:, None]
        return logits


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_parameter_that_one_rank_reaches_is_trained_one_that_none_does_is_not(clip):
    """As on one device: no gradient is not a gradient of zero, which would decay the weights."""
    made = job(
        model=Reaching,
        clip_norm=clip,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.5),
    )
    model = fresh(made)
    want = list(torch_loop(made, model, 5, clip=clip))
    (seen, found), *_ = on_ranks(made, "data=3", lambda s: (losses(s, 5), weights(s)), eager=True)
    assert seen == pytest.approx(want, rel=1e-5)
    close(found, model.state_dict())
    assert torch.equal(found["never.weight"], fresh(made).never.weight)


def test_batch_norm_runs_on_one_rank_and_is_refused_on_more():
    made = job(model=lambda: Net(nn.BatchNorm1d(40)))
    model = fresh(made).train()
    want = list(torch_loop(made, model, 3))
    session = alone(made, eager=True)
    assert losses(session, 3) == pytest.approx(want, rel=1e-5)
    close(weights(session), model.state_dict())
    with pytest.raises(PlanError, match=r"data=2 would take batch norm's statistics"):
        on_ranks(made, "data=2", lambda s: None, eager=True)
    with pytest.raises(PlanError, match=r"--eager runs the model as it is.*zero=3; use zero=0"):
        on_ranks(job(), "zero3,data=2", lambda s: None, eager=True)


@pytest.mark.parametrize("eager", [True, False])
def test_what_was_left_of_a_failed_step_is_not_added_to_the_next(eager):
    """The second micro-batch of a step fails once."""

    made = job()
    session = alone(made, "data=1,microbatches=2", eager=eager)
    seen = losses(session, 1)
    worker, load = session.worker, type(session.worker).work

    def failing(fetched, upcoming):
        work = load(worker, fetched, upcoming)
        whole = work.load

        def once(microbatch):
            if microbatch == 1:
                raise ValueError("once")
            return whole(microbatch)

        work.load = once
        return work

    worker.work = failing
    with pytest.raises(ValueError, match="once"):
        step(session)
    assert {name.partition("/")[0] for name in worker.state.values} == {"model", "scale"}
    del worker.work
    assert seen + losses(session, 1) == pytest.approx(losses(alone(made), 2), rel=1e-5)


def test_a_step_that_is_not_finite_leaves_nothing_behind():
    class Blowing(Points):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"bad": torch.tensor(float(index == 7))}

    def loss(model, batch):
        return (mean_loss(model, batch) / (1 - batch["bad"].max())).mean()

    made = job(data=lambda: Blowing(24), loss=loss)
    traced, eager = alone(made, nonfinite="skip"), alone(made, nonfinite="skip", eager=True)
    assert losses(eager, 4) == pytest.approx(losses(traced, 4), rel=1e-5, nan_ok=True)
    close(weights(eager), weights(traced))


def test_frozen_unheld_and_tied_are_as_in_a_plain_loop():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 3), nn.Linear(3, 8)
            self.down.weight = nn.Parameter(self.up.weight.detach().T.clone())
            self.again = self.up
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.again(self.down(self.up(x))))

    made = job(model=Tied, optimizer=lambda m: torch.optim.SGD(m.up.parameters(), lr=0.1))
    model = fresh(made)
    want = list(torch_loop(made, model, 3))
    (seen, found), *_ = on_ranks(made, "data=2", lambda s: (losses(s, 3), weights(s)), eager=True)
    assert seen == pytest.approx(want, rel=1e-5)
    close(found, model.state_dict())


def test_evaluation_prediction_and_short_batches():
    made = job(
        loss=lambda model, batch: weighted_loss(model, batch)[:2],
        evaluation=lambda: Points(13, seed=9),
    )
    traced = alone(made)

    def body(session):
        rows = session.predict(Points(5), lambda model, batch: {"y": model(batch["x"])})["y"]
        one = session.predict(Points(1), lambda model, batch: model(batch["x"]))
        return session.evaluate(), rows, one

    want, rows, first = body(traced)
    for found, seen, one in on_ranks(made, "data=3", body, eager=True):
        assert found == pytest.approx(want, rel=1e-5)
        torch.testing.assert_close(seen, rows)
        torch.testing.assert_close(one, first)


def test_evaluating_leaves_the_mode_as_it_was():
    made = job(model=lambda: Net(nn.Dropout(0.5)), evaluation=Points)
    plain, session = alone(made, eager=True), alone(made, eager=True)
    seen = []
    for _ in range(3):
        seen += losses(session, 1)
        session.evaluate()
    assert seen == losses(plain, 3)


def test_checkpoints_are_of_the_one_kind(tmp_path):
    """Saved eagerly, continued traced under ZeRO, and back."""
    want = losses(alone(job()), 6)
    session = alone(job(), eager=True)
    losses(session, 2)
    session.save(tmp_path)

    def go_on(session):
        session.resume(tmp_path)
        seen = losses(session, 2)
        session.save(tmp_path)
        return seen

    assert on_ranks(job(), "zero3,data=2", go_on)[0] == pytest.approx(want[2:4], rel=1e-5)
    assert on_ranks(job(), "data=2", go_on, eager=True)[0] == pytest.approx(want[4:], rel=1e-5)


def test_what_is_watched_is_seen():
    class Shown(nn.Module):
        def forward(self, x):
            return mw.watch("hidden", x)

    made = job(model=lambda: Net(Shown()))
    want = step(alone(made)).metrics.watched["hidden"]
    assert want.shape == (12, 40)
    found = on_ranks(made, "data=3", lambda s: step(s).metrics.watched["hidden"], eager=True)
    torch.testing.assert_close(torch.cat(found), want)


@pytest.mark.parametrize("plan", ["data=1", "data=2"])
def test_a_loss_without_gradient_is_told(plan):
    made = job(
        loss=lambda model, batch: F.cross_entropy(torch.zeros(12 // int(plan[-1]), 3), batch["y"])
    )
    with pytest.raises(UserCodeError, match="does not depend on any parameter"):
        on_ranks(made, plan, lambda s: losses(s, 1), eager=True)
