"""Conditions on values: those that say what they expect are traced, and watched while running."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.errors import NotTraceable, UserCodeError
from tests.compile.conditions import Asks, Asserts, Clamps, Raises, RaisesIfAny, RaisesUnlessAll
from tests.equal.harness import Case, assert_equal
from tests.run.jobs import Net, alone, fresh, job, losses, on_ranks, step

PLAN = "data=2,tensor=2,microbatches=3"


KINDS = (Raises, RaisesUnlessAll, RaisesIfAny, Asserts, Clamps, Asks)


def all_of_them():
    return nn.Sequential(*(kind() for kind in KINDS))


def test_what_conditions_expect_is_traced_and_equals_eager():
    made = Case(job(model=lambda: Net(all_of_them())))
    assert_equal(made.verify(PLAN, steps=2))
    (unit,) = {unit.program.digest: unit for unit in made.units[torch.float64].values()}.values()
    watched = [name for name, _ in unit.program.outputs if name.startswith("total/check/")]
    assert len(watched) == len(KINDS)


def reads_x(model, batch):
    if (batch["x"] > 8).any():
        raise ValueError("too large")
    return F.cross_entropy(model(batch["x"]), batch["y"])


def outlying(at):
    """`Points` of which one is an outlier."""
    made = job().data()
    made.x[at] = 9.0
    return made


def test_a_step_whose_data_fail_the_check_is_refused():
    """One sample of one rank: the loss is finite, but eager code would have raised."""
    made = job(loss=reads_x, data=lambda: outlying(7), clip_norm=1.0)
    line = reads_x.__code__.co_firstlineno + 1
    told = rf"test_check\.py:{line}: in step \d the condition there.*torch\.where"
    with pytest.raises(UserCodeError, match=told):
        on_ranks(made, "data=2,microbatches=2", lambda session: losses(session, 5))
    calm = job(loss=reads_x)
    assert len(on_ranks(calm, "data=2,microbatches=2", lambda session: losses(session, 5))) == 2


def test_nothing_of_that_step_is_applied():
    made = job(loss=reads_x, data=lambda: outlying(slice(None)))
    session = alone(made)
    with pytest.raises(UserCodeError, match=r"test_check\.py:\d+: in step 1 the condition"):
        step(session)
    before = fresh(made).state_dict()
    for name, weight in before.items():
        assert torch.equal(session.worker.state.values[f"model/{name}"], weight)


def test_evaluation_watches_too():
    made = job(loss=reads_x)
    session = alone(made)
    step(session)
    with pytest.raises(UserCodeError, match=r"test_check\.py:\d+: in this batch the condition"):
        session.evaluate(outlying(3))


class Waits(nn.Module):
    def forward(self, x):
        while (x < 2).all():
            x = x + 0
        return x


class Chooses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("kind", [Waits, Chooses])
def test_a_condition_that_expects_nothing_is_refused(kind):
    with pytest.raises(NotTraceable, match="reads a tensor's value"):
        step(alone(job(model=lambda: Net(kind()))))
