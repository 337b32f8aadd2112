"""The average of the weights: in place of them, in checkpoints of any plan, in the bill."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meshwright.errors import PlanError, StorageError, UsageError
from meshwright.run.account import away_of, state_of
from meshwright.run.average import Average
from meshwright.run.bill import away, bills
from meshwright.run.checkpoint.save import open_checkpoint
from tests.run.jobs import Net, Points, alone, close, fresh, job, losses, on_ranks, torch_loop

DECAY, STEPS = 0.8, 4
PLANS = ("data=1", "zero1,data=2", "zero3,data=3", "zero3,data=2,offload=disk")


@cache
def made():
    return job(ema=DECAY, evaluation=lambda: Points(20, seed=9))


@cache
def by_hand():
    """What a user writes for one device: torch's averaged model after the steps, and the model."""
    model = fresh(made())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for _ in torch_loop(made(), model, STEPS):
        average.update_parameters(model)
    return dict(average.module.state_dict()), dict(model.state_dict())


def state(module):
    return None if module is None else dict(module.state_dict())


@pytest.mark.parametrize("plan", PLANS)
def test_everything_takes_the_average_in_place_of_the_weights(plan, tmp_path):
    averaged, trained = by_hand()

    def forward(model, batch):
        return model(batch["x"])

    def body(session):
        losses(session, STEPS)
        names = ("current", "ema")
        found = [session.evaluate(weights=name)["loss"] for name in names]
        rows = [session.predict(Points(20, seed=9), forward, name) for name in names]
        session.export(tmp_path / "out", "ema")
        kept = [state(session.module(name)) for name in ("ema", "current")]
        return found, rows, kept

    (found, rows, (ema, current)), *_ = on_ranks(made(), plan, body)
    close(ema, averaged)
    close(current, trained)
    close(load_file(tmp_path / "out" / "model.safetensors"), averaged)
    points = Points(20, seed=9)
    for weights, loss, row in zip((trained, averaged), found, rows, strict=True):
        model = Net()
        model.load_state_dict(weights)
        torch.testing.assert_close(row, model(points.x).detach())
        assert loss == pytest.approx(float(nn.functional.cross_entropy(row, points.y)), rel=1e-5)
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("plan", ["data=1", "zero2,data=2", "zero1,data=2,offload=disk"])
def test_training_goes_on_as_if_the_average_had_not_been_used(plan):
    def body(session, *, use):
        losses(session, 2)
        if use:
            session.evaluate(weights="ema")
        return losses(session, 2)

    one, two = (
        on_ranks(made(), plan, lambda s, use=use: body(s, use=use)) for use in (True, False)
    )
    assert one == two


@pytest.mark.parametrize(
    ("save", "load"),
    [
        ("zero3,data=3", "zero1,data=2"),
        ("data=1", "tensor=2"),
        ("zero1,data=2,offload=disk", "data=1,offload=host"),
        ("zero2,data=2", "zero3,data=2,offload=disk"),
    ],
)
def test_any_plan_goes_on_with_the_average_of_any_other(save, load, tmp_path):
    def first(session):
        losses(session, 2)
        return session.save(tmp_path)

    path, *_ = on_ranks(made(), save, first)

    def second(session):
        session.resume(tmp_path)
        losses(session, STEPS - 2)
        return state(session.module("ema")), session.notes

    (ema, notes), *_ = on_ranks(made(), load, second)
    close(ema, by_hand()[0])
    assert not [note for note in notes if "average" in note]
    with open_checkpoint(path) as checkpoint:
        names = {n for n in checkpoint.entries if n.startswith("ema/")}
        assert names == {f"ema/{name}" for name, _ in Net().named_parameters()}
        assert checkpoint.meta["average"] == {"decay": DECAY, "steps": 2}


def test_an_average_begins_with_a_checkpoint_that_has_none_and_says_so(tmp_path):
    plain = replace(made(), ema=None)
    session = alone(plain)
    losses(session, 2)
    session.save(tmp_path)
    begun = alone(made())
    begun.resume(tmp_path)
    assert [note for note in begun.notes if "ema=0.8 begins with those of step 2" in note]
    trained = state(begun.module())
    close(state(begun.module("ema")), trained, to=0)
    losses(begun, 1)
    close(state(begun.module("ema")), state(begun.module()), to=0)  # of the first step, as torch's
    begun.save(tmp_path)
    left = alone(plain)
    left.resume(tmp_path)
    assert [note for note in left.notes if "holds an average of the weights (ema=0.8)" in note]


def test_buffers_are_the_newest():
    norm = lambda: Net(nn.BatchNorm1d(40))  # noqa: E731
    session = alone(job(model=norm, ema=DECAY))
    losses(session, 3)
    ema, current = state(session.module("ema")), state(session.module())
    assert torch.equal(ema["middle.running_mean"], current["middle.running_mean"])
    assert not torch.equal(ema["middle.weight"], current["middle.weight"])


def test_a_skipped_step_does_not_count():
    def loss(model, batch):
        found = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        return found / batch["w"].min()  # no sample that counts less: not finite

    session = alone(job(loss=loss, ema=DECAY), nonfinite="skip")
    before = state(session.module("ema"))
    record = session.run_step()
    assert record.metrics.skipped
    assert session.worker.state.average.steps == 0
    close(state(session.module("ema")), before, to=0)


def test_what_is_not_trained_has_no_average():
    def frozen():
        net = Net()
        net.up.requires_grad_(False)
        return net

    session = alone(job(model=frozen, ema=DECAY))
    assert set(session.worker.state.average.tensors) == {"down.weight", "down.bias"}


def test_an_average_of_16_bits_is_kept_in_32():
    shards = {"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    average = Average.of(0.999, shards)
    average.take(shards)
    shards["w"].data.fill_(2.0)
    average.take(shards)
    torch.testing.assert_close(average.tensors["w"], torch.full((4,), 1.001))


@pytest.mark.parametrize("plan", ["data=2", "zero1,data=2"])
def test_the_bill_has_it(plan):
    def body(session):
        bill, *_ = bills(session.build, session.take().micros)
        held = session.worker.state.average.tensors.values()
        return bill["average"], sum(tensor.nbytes for tensor in held)

    (told, held), *_ = on_ranks(made(), plan, body)
    assert told == held > 0


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_it_rests_where_the_optimizers_state_does(tier):
    """What the bill says, and what is there, grows by the average in that tier only."""

    def body(session):
        losses(session, 2)
        parts, *_ = bills(session.build, session.take().micros)
        average = session.worker.state.average
        held = sum(t.nbytes for t in average.tensors.values()) if average else 0
        kept = {**parts, **state_of(session.worker)}
        assert "average" not in kept
        return away(session.build, session.worker.rank), away_of(session.worker), held

    plan = f"zero1,data=2,offload=optimizer:{tier}"
    with_it, without = (
        on_ranks(each, plan, body)[0] for each in (made(), replace(made(), ema=None))
    )
    for more, less in zip(with_it[:2], without[:2], strict=True):
        assert more[tier] - less[tier] == with_it[2] > 0
        assert {t: more[t] for t in more if t != tier} == {t: less[t] for t in less if t != tier}


def test_a_damaged_average_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_OFFLOAD", str(tmp_path))

    def body(session):
        losses(session, 2)
        session.worker.state.average.tensors["up.weight"].zero_()  # mapped: past all digests
        losses(session, 1)

    with pytest.raises(StorageError, match=r"was changed.*so ema/up\.weight is lost"):
        on_ranks(made(), "zero1,data=2,offload=optimizer:disk", body)


def test_the_eager_door_keeps_it_too():
    def body(session):
        losses(session, STEPS)
        return state(session.module("ema"))

    found, *_ = on_ranks(made(), "data=2", body, eager=True)
    close(found, by_hand()[0])


def test_the_user_is_told_what_cannot_be():
    with pytest.raises(UsageError, match=r"ema is 1\.0, but must be a number above 0 and below 1"):
        job(ema=1.0)
    session = alone(job())
    with pytest.raises(UsageError, match=r"give Job\(ema=0.999\)"):
        session.evaluate(Points(), weights="ema")
    with pytest.raises(UsageError, match="use 'current' or 'ema'"):
        session.module("mean")
    with pytest.raises(PlanError, match=r"ema=0\.8 averages"):
        on_ranks(made(), "pipeline=2,schedule=pipedream", lambda session: session)
