"""AdaScale: the paper's numbers, kept over checkpoints, in the log, and the end of training."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import meshwright as mw
from meshwright.compile.outcome import RESERVED
from meshwright.errors import PlanError, UsageError, UserCodeError
from meshwright.job import AdaScale
from meshwright.run.optimizer.adascale import further, gains_of, restored, saved
from meshwright.run.session import steps_to_run
from meshwright.view.journal import line_of
from tests.run.jobs import alone, job, on_ranks, sgd, step, weighted_loss
from tests.run.test_persist import saved as saved_run

GROUPS = ((("a", "b"), {"lr": 0.1}), (("c",), {"lr": 0.2}))


def fresh(**rule):
    return gains_of(AdaScale(**{"scale": 4, **rule}), GROUPS, 2)


def test_a_step_by_hand():
    """Slices of one number each: 1, 2, 3, 6, whose mean is 3 and variance 14 / 3."""
    gains = fresh(smoothing=0.5)
    assert gains.gain() == 1.0
    after = gains.after([1 + 4 + 9 + 36.0, 4.0], [9.0, 1.0])
    variance, mean = 14 / 3, 9 - 14 / 3 / 4
    assert after.gain(0) == pytest.approx((variance + mean) / (variance / 4 + mean), rel=1e-12)
    assert after.gain(1) == pytest.approx(1.0, abs=1e-5)  # all alike
    assert after.iterations == after.gain()
    again = after.after([4 * 9.0, 4.0], [9.0, 1.0])  # without variance; the first one's counts half
    mean, variance = (mean + 2 * 9) / 3, variance / 3
    assert again.gain(0) == pytest.approx((variance + mean) / (variance / 4 + mean), rel=1e-5)


@given(st.integers(2, 64), st.lists(st.tuples(*[st.floats(0, 1e6)] * 2), min_size=1, max_size=5))
def test_a_gain_is_between_one_and_the_scale(scale, steps):
    gains = gains_of(AdaScale(scale), GROUPS[:1], 1)
    for total, more in steps:
        gains = gains.after([scale * total + more], [total])  # by Jensen no less
        assert 1.0 <= gains.gain() <= scale * (1 + 1e-12)


def test_rates_are_scaled_by_group_and_come_back():
    gains = fresh(smoothing=0.0).after([50.0, 4.0], [9.0, 1.0])
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1} for p in parameters])
    with gains.scaled(optimizer):
        rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.1 * gains.gain(0), 0.1 * gains.gain(1)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_schedules_go_on_by_whole_iterations():
    gains = fresh()
    steps = [replace(gains, iterations=t) for t in (0.0, 1.7, 3.9, 4.0, 4.9)]
    assert [further(a, b) for a, b in pairwise(steps)] == [1, 2, 1, 0]
    assert further(None, None) == 1


def test_a_step_that_is_not_finite_is_not_averaged():
    gains = fresh(smoothing=0.5).after([50.0, 4.0], [9.0, 1.0])
    after = gains.after([math.inf, 4.0], [math.nan, 1.0])
    assert replace(after, iterations=0.0) == replace(gains, iterations=0.0)
    assert after.iterations == 2 * gains.iterations


def test_it_is_kept_and_restored():
    gains = fresh(smoothing=0.5).after([50.0, 4.0], [9.0, 1.0])
    assert restored(fresh(smoothing=0.5), saved(gains)) == gains
    assert restored(fresh(), None) == fresh()
    assert saved(None) is None
    finer = restored(fresh(scale=8), saved(gains))
    assert finer.variances == tuple(2 * v for v in gains.variances)
    assert finer.means == gains.means


def test_a_group_without_a_rate_is_refused():
    with pytest.raises(UserCodeError, match="adascale scales learning rates, but optimizer group"):
        gains_of(AdaScale(4), ((("a",), {}),), 1)
    assert gains_of(None, GROUPS, 1) is None


MADE = job(
    optimizer=sgd,
    loss=weighted_loss,
    adascale=AdaScale(4, smoothing=0.3),
    schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95),
)


def told(session, steps=3):
    found = [step(session).metrics for _ in range(steps)]
    return [(m.loss, m.gain, m.iterations) for m in found] + [(session.lr,)]


def close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_checkpoint_goes_on_under_other_plans(tmp_path):
    saved_run(MADE, "zero3,data=2,microbatches=2", tmp_path, 3)
    plain = alone(MADE, "data=1,microbatches=4")
    for _ in range(3):
        step(plain)
    want = told(plain)
    for plan in ("data=4", "tensor=2,microbatches=4"):

        def body(session):
            session.resume(tmp_path)
            return told(session)

        close(on_ranks(MADE, plan, body)[0], want)


@pytest.mark.parametrize("plan", ["data=1,microbatches=4", "data=2,microbatches=2"])
def test_the_eager_door_gives_the_same(plan):
    want = told(alone(MADE, "data=1,microbatches=4"))
    close(on_ranks(MADE, plan, told, eager=True)[0], want)


def test_the_eager_door_has_slices_of_ranks_only():
    with pytest.raises(PlanError, match="use microbatches=2, or leave out --eager"):
        on_ranks(MADE, "data=2,microbatches=4", told, eager=True)


def test_the_log_has_gain_and_iterations():
    record = step(alone(MADE, "data=1,microbatches=4"))
    line, names = line_of(record), {"adascale_gain", "adascale_iterations"}
    assert line["adascale_gain"] == record.metrics.gain
    assert line["adascale_iterations"] == record.metrics.iterations
    assert names <= RESERVED
    assert not names & line_of(step(alone(job()))).keys()


def test_training_ends_after_iterations(tmp_path):
    rule = AdaScale(4, smoothing=0.3, iterations=9)
    made = replace(MADE, adascale=rule)
    session = alone(made, "data=1,microbatches=4")
    assert steps_to_run(session, None) == 9
    with mw.Run(made, plan="data=1,microbatches=4", run_dir=tmp_path / "run") as run:
        counts = [run.step().iterations for _ in run.steps()]
    assert counts[-1] >= 9 > counts[-2]
    assert len(counts) < 9


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"scale": 1}, "adascale's scale=1 has no variance between slices; use 2 or more"),
        ({"scale": 2.5}, "adascale's scale is 2.5, but must be a whole number, 1 or more"),
        ({"scale": 4, "smoothing": 1.0}, "smoothing is 1.0, but must be a number from 0 to below"),
        ({"scale": 4, "smoothing": True}, "smoothing is True, but must be a number from 0 to"),
        ({"scale": 4, "iterations": 0}, "adascale's iterations=0, but must be 1 or more"),
    ],
)
def test_rules_that_cannot_be(how, words):
    with pytest.raises(UsageError, match=words):
        AdaScale(**how)


def test_jobs_that_cannot_have_it():
    with pytest.raises(UsageError, match="adascale is 4, but must be an AdaScale, such as"):
        job(adascale=4)
    with pytest.raises(UsageError, match=r"scale=5 does not divide batch_size=12 .*; use scale=4"):
        job(adascale=AdaScale(5))
    with pytest.raises(UsageError, match="use scale=7, or another batch_size"):
        job(adascale=AdaScale(3), batch_size=7)
