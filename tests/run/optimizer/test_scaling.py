"""fp16: the loss scale moves as torch's GradScaler, and all ranks leave out the same steps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from meshwright.errors import UsageError, UserCodeError
from meshwright.job import LossScale
from meshwright.plan.plan import Plan
from meshwright.run.optimizer.scaling import nonfinite, restored, saved, scaling_of
from meshwright.run.step import StepWork
from tests.run.jobs import Net, Points, adamw, alone, fresh, job, mean_loss, on_ranks, step, weights
from tests.run.test_persist import saved as saved_run

FP16 = ",precision=fp16"
HIGH = LossScale(initial=2.0**26, growth=16.0, backoff=2.0**-4, interval=3)
"""Overflows at first, and by far: a rank's term of a gradient is smaller than the sum."""


def test_the_scale_moves_as_torchs():
    rule = LossScale(initial=1000.0, growth=1.7, backoff=0.3, interval=3)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=1000.0, growth_factor=1.7, backoff_factor=0.3, growth_interval=3
    )
    weight = nn.Parameter(torch.zeros(2))
    optimizer, here = torch.optim.SGD([weight], lr=0.0), scaling_of(rule, 8)
    for overflowed in (np.random.default_rng(0).random(300) < 0.12).tolist():
        assert scaler.scale(torch.ones(())).item() == here.scale
        weight.grad = torch.tensor([1.0, math.inf if overflowed else 2.0])
        scaler.step(optimizer)
        scaler.update()
        here = here.after(overflowed=overflowed)
    assert here.operand(torch.zeros(())).item() == np.float32(here.scale / 8)


def test_a_scale_never_grows_to_infinity():
    here = scaling_of(LossScale(initial=2.0**127, interval=1), 1)
    assert here.after(overflowed=False).scale == 2.0**127


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_element_that_is_not_finite_is_found(bad):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        good = [torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype), torch.zeros(0)]
        assert nonfinite(good) == 0
        good[0][2, 4] = bad
        assert nonfinite(good) == 1
    assert nonfinite([]) == 0


def looped(made, steps, clip=None):
    """What a user would write: (loss, scale, skipped) of each step, and the model."""
    session = alone(made)
    model, rule = fresh(made), made.loss_scale
    optimizer = made.optimizer(model)
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=rule.initial,
        growth_factor=rule.growth,
        backoff_factor=rule.backoff,
        growth_interval=rule.interval,
    )
    found = []
    for at in range(steps):
        batch = session.worker.source.fetch(at, 0, made.batch_size, (0, made.batch_size)).tree
        with torch.autocast("cpu", dtype=torch.float16):
            loss = made.loss(model, batch)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append((loss.item(), scale, scaler.get_scale() < scale))
    return found, {n: t.detach() for n, t in model.state_dict().items()}


def ran(session, steps):
    """The same of a run."""
    taken = [step(session).metrics for _ in range(steps)]
    assert [m.skipped for m in taken] == [m.overflowed for m in taken]
    return [(m.loss, m.loss_scale, m.skipped) for m in taken], weights(session)


def test_a_run_is_a_loop_with_gradscaler_to_the_bit():
    made = job(batch_size=16, loss_scale=HIGH)
    found, after = ran(alone(made, "data=1" + FP16), 12)
    wanted, model = looped(made, 12)
    assert found == wanted
    assert {skipped for _, _, skipped in found} == {True, False}
    assert len({scale for _, scale, _ in found}) > 2  # it backed off, and grew
    assert all(torch.equal(after[name], tensor) for name, tensor in model.items())


@pytest.mark.parametrize(
    ("plan", "eager"),
    [
        ("data=2", True),
        ("zero3,data=2,microbatches=2", False),
        ("pipeline=2,microbatches=2", False),
        *(
            pytest.param(plan, False, marks=pytest.mark.matrix)
            for plan in ("data=2", "zero1,data=2", "zero2,data=3", "tensor=2")
        ),
    ],
)
def test_ranks_leave_out_the_steps_of_one_device(plan, eager):
    made = job(loss_scale=HIGH, clip_norm=0.2)
    wanted, model = looped(made, 9, clip=0.2)
    results = on_ranks(made, plan + FP16, lambda session: ran(session, 9), eager=eager)
    for found, _ in results:
        assert [rest for _, *rest in found] == [rest for _, *rest in wanted]
        assert [x for x, *_ in found] == pytest.approx([x for x, *_ in wanted], rel=2**-10)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, model[name], rtol=2e-3, atol=2e-4)


class Spiked(Points):
    """One sample in ten is beyond what fp16 holds, so that one rank alone overflows."""

    def __init__(self):
        super().__init__(48)
        self.x[::10] = 1e6


def noted(session):
    """Which of four steps were skipped, whether all stayed as it was, and the learning rate."""
    found = []
    for _ in range(4):
        before = {n: t.clone() for n, t in session.worker.state.values.items()}
        record = step(session)
        after = session.worker.state.values
        same = all(torch.equal(after[n], t) for n, t in before.items() if n != "scale")
        found.append((record.metrics.skipped, same, session.lr))
    return found


@pytest.mark.parametrize("plan", ["data=3", "zero2,data=3"])
def test_what_one_rank_finds_all_leave_out(plan):
    made = job(
        data=Spiked,
        batch_size=3,
        model=lambda: Net(nn.BatchNorm1d(40)),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    told = on_ranks(made, plan + FP16, noted)
    assert told[0] == told[1] == told[2]
    skipped = [skip for skip, _, _ in told[0]]
    assert {True, False} == set(skipped)
    assert skipped == [same for _, same, _ in told[0]]  # buffers too
    applied = np.cumsum([not skip for skip in skipped])
    assert [lr for _, _, lr in told[0]] == [0.1 * 0.5**n for n in applied]


def test_one_ranks_overflow_is_its_own_before_it_is_agreed(monkeypatch):
    """Of sharded gradients each rank sees its own part: the second layer's overflow, say."""
    finish, mine = StepWork.finish, {}

    def finishing(work, values):
        finish(work, values)
        names, vector = work.totals.names, work.totals.vector.tolist()
        mine.setdefault(work.step, []).append(vector[names.index("overflow")])

    monkeypatch.setattr(StepWork, "finish", finishing)

    def body(session):
        if session.worker.rank == 1:
            session.worker.state.values["scale"].mul_(math.inf)
        return step(session).metrics.overflowed

    made = job(loss_scale=LossScale(initial=1.0))
    assert on_ranks(made, "pipeline=2,microbatches=2" + FP16, body) == [True, True]
    assert mine.keys() == {0}
    assert len(mine[0]) == 2


def test_the_door_eager_keeps_buffers_of_a_skipped_step():
    made = job(data=Spiked, batch_size=3, model=lambda: Net(nn.BatchNorm1d(40)))
    traced = noted(alone(made, "data=1" + FP16))
    eager = noted(alone(made, "data=1" + FP16, eager=True))
    assert eager == traced
    assert any(skipped for skipped, *_ in eager)


@pytest.mark.parametrize(
    ("first", "then"),
    [("zero3,data=2", "data=1"), pytest.param("data=1", "tensor=2", marks=pytest.mark.matrix)],
)
def test_a_checkpoint_keeps_where_the_scale_is(first, then, tmp_path):
    made = job(loss_scale=HIGH)
    straight = [alone_step.metrics for alone_step in _steps(alone(made, "data=1" + FP16), 12)]
    saved_run(made, first + FP16, tmp_path, steps=8)

    def go_on(session):
        assert session.resume(tmp_path) is not None
        return [record.metrics.loss_scale for record in _steps(session, 4)]

    wanted = [metrics.loss_scale for metrics in straight]
    assert len(set(wanted[8:])) > 1
    for found in on_ranks(made, then + FP16, go_on):
        assert found == wanted[8:]


def _steps(session, count):
    return [step(session) for _ in range(count)]


def test_a_checkpoint_of_float32_begins_at_the_first_scale(tmp_path):
    made = job(loss_scale=LossScale(initial=512.0))
    saved_run(made, "data=1", tmp_path, steps=2)
    session = alone(made, "data=1" + FP16)
    assert session.resume(tmp_path) is not None
    assert step(session).metrics.loss_scale == 512.0


def test_a_checkpoint_of_fp16_goes_on_without_a_scale(tmp_path):
    made = job()
    saved_run(made, "data=1" + FP16, tmp_path, steps=2)
    session = alone(made)
    assert session.resume(tmp_path) is not None
    assert step(session).metrics.loss_scale is None


def test_what_is_kept_comes_back():
    here = replace(scaling_of(HIGH, 4), scale=96.0, steps=2, skipped=1)
    assert restored(scaling_of(HIGH, 4), saved(here)) == here
    assert saved(None) is None


class Beyond(Net):
    """Its activations are beyond fp16 at any loss scale."""

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) * 1e6)


@pytest.mark.parametrize("plan", ["zero3,data=2", "pipeline=2,microbatches=2"])
def test_a_scale_that_is_never_found_is_an_error_on_every_rank(plan):
    made = job(model=Beyond, loss_scale=LossScale(initial=4.0, patience=3))

    ends = []

    def body(session):
        before = {n: t.clone() for n, t in session.worker.state.values.items() if n != "scale"}
        try:
            _steps(session, 9)
        finally:
            after = session.worker.state.values
            ends.append((session.step, all(torch.equal(after[n], t) for n, t in before.items())))

    with pytest.raises(UserCodeError) as caught:
        on_ranks(made, plan + FP16, body)
    message = str(caught.value)
    assert ends == [(2, True)] * Plan.parse(plan).ranks
    assert "no loss scale was found: the gradients of 3 steps in a row overflowed" in message
    assert "those of step 3 at a loss scale of 1; nothing of these" in message
    assert "its forward goes beyond fp16's 65504. Use precision=bf16" in message


def test_patience_counts_overflows_in_a_row():
    made = job(data=Spiked, batch_size=3, loss_scale=LossScale(patience=4))
    skipped = [record.metrics.skipped for record in _steps(alone(made, "data=1" + FP16), 32)]
    assert sum(skipped) > 4


def test_a_loss_that_is_not_finite_with_gradients_that_are_is_the_users_error():
    made = job(loss=lambda model, batch: mean_loss(model, batch) + math.inf)
    with pytest.raises(UserCodeError, match="the loss is inf in step 1"):
        step(alone(made, "data=1" + FP16))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"initial": 0.0}, "loss_scale's initial is 0.0, but must be a number above 0"),
        ({"initial": math.inf}, "loss_scale's initial is inf"),
        ({"growth": 1.0}, "loss_scale's growth is 1.0, but must be a number above 1"),
        ({"backoff": 1.0}, "loss_scale's backoff is 1.0, but must be a number above 0 and below 1"),
        ({"interval": 0}, "loss_scale's interval=0, but must be 1 or more"),
        ({"patience": True}, "loss_scale's patience is True"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        LossScale(**settings)


def test_a_job_takes_a_loss_scale_only():
    with pytest.raises(UsageError, match="loss_scale is 128, but must be a LossScale"):
        job(loss_scale=128)


def test_float32_scales_nothing():
    session = alone(job(optimizer=adamw))
    assert step(session).metrics.loss_scale is None
    assert session.worker.state.scaling is None
