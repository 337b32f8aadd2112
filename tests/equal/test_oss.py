"""FairScale's OSS as ZeRO-1: what its tests ask of it, held against one device (so against DDP)."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from meshwright.optim import LAMB
from meshwright.run.checkpoint.save import newest
from tests.equal.harness import Case, assert_equal
from tests.run.jobs import HIDDEN, IN, close, job, on_ranks, step

KINDS = {
    "sgd, momentum": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "sgd, fused": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adam, amsgrad": lambda m: optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "adamw, foreach": lambda m: optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "adamw, fused": lambda m: optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), lr=0.01, centered=True),
    "adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.1),
    "adadelta": lambda m: optim.Adadelta(m.parameters()),
    "nadam": lambda m: optim.NAdam(m.parameters(), lr=0.01),
    "radam": lambda m: optim.RAdam(m.parameters(), lr=0.01),
    "lamb": lambda m: LAMB(m.parameters(), lr=0.01),
}


@pytest.mark.parametrize("name", ["sgd, momentum", "adamw, fused"])
def test_parity_with_replicas_for_an_optimizer(name):
    assert_equal(Case(job(optimizer=KINDS[name])).verify("zero1,data=3", steps=3))


@pytest.mark.matrix
@pytest.mark.parametrize("plan", ["zero1,data=3", "zero3,data=2", "tensor=2", "zero2,data=2"])
@pytest.mark.parametrize("name", KINDS)
def test_parity_with_replicas_for_every_optimizer(name, plan):
    assert_equal(Case(job(optimizer=KINDS[name])).verify(plan, steps=4))


def norm_of(session):
    return step(session).metrics.gradient_norm


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_is_that_of_the_whole_gradient(clip):
    made = job(optimizer=KINDS["sgd, momentum"], clip_norm=clip)
    assert_equal(Case(made).verify("zero1,data=2", steps=2))
    norms = on_ranks(made, "zero1,data=3", norm_of)
    (whole,) = on_ranks(made, "data=1", norm_of)
    assert norms == [pytest.approx(whole, rel=1e-5)] * 3


def grouped(model):
    """Two groups, the second added later; the last bias stays as it is."""
    made = optim.AdamW([{"params": [model.up.weight], "weight_decay": 0.3}], lr=0.05)
    made.add_param_group({"params": [model.down.weight, model.up.bias], "lr": 0.01})
    return made


def by_group(optimizer):
    return lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1 / (1 + t)])


def test_groups_that_are_added_keep_their_settings_and_schedules():
    case = Case(job(optimizer=grouped, schedule=by_group))
    for plan in ("zero1,data=3", "zero3,data=2"):
        assert_equal(case.verify(plan, steps=3))
    (session,) = case.workers(case.build("zero1,data=1"))
    first, second = session.state.optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.01)
    assert (first["lr"], second["lr"], len(second["params"])) == (0.05, 0.01, 2)


class Lopsided(nn.Module):
    """One tensor dominates; the others are too small to be split."""

    def __init__(self):
        super().__init__()
        self.up, self.scale = nn.Linear(IN, 5 * HIDDEN), nn.Parameter(torch.ones(()))
        self.down = nn.Linear(5 * HIDDEN, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))) * self.scale


def test_one_large_tensor_is_shared_by_all_ranks_and_none_holds_all_the_state():
    """OSS gives whole parameters to ranks, so that the largest bounds its gain; shards do not."""
    case = Case(job(model=Lopsided, optimizer=KINDS["adamw, foreach"]))
    assert_equal(case.verify("zero1,data=4", steps=2))
    workers = case.workers(case.build("zero1,data=4"))
    held = [sum(s.numel() for s in w.state.shards.values()) for w in workers]
    total = sum(p.numel() for p in Lopsided().parameters())
    assert max(held) <= total / 4 + 5 * HIDDEN + 4


class Tiny(nn.Module):
    """Nothing is worth splitting: every rank has all of it, and none an empty shard."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(IN, 3)

    def forward(self, x):
        return self.down(x)


def test_where_no_rank_has_a_shard_of_its_own():
    made = job(model=Tiny, optimizer=KINDS["sgd, momentum"])
    assert_equal(Case(made).verify("zero1,data=3", steps=2))


@pytest.mark.parametrize("name", ["adamw, foreach", pytest.param("lamb", marks=pytest.mark.matrix)])
def test_the_state_goes_round_through_other_numbers_of_ranks(name, tmp_path):
    made = job(optimizer=KINDS[name])

    def go_on(session):
        if newest(tmp_path) is not None:
            session.resume(tmp_path)
        step(session)
        session.save(tmp_path)
        return {n: t.clone() for n, t in session.worker.state.values.items() if "model/" in n}

    for ranks in (2, 3, 1, 4):
        found = on_ranks(made, f"zero1,data={ranks}", go_on)[0]

    def straight(session):
        for _ in range(4):
            step(session)
        return {n: t.clone() for n, t in session.worker.state.values.items() if "model/" in n}

    close(found, on_ranks(made, "data=1", straight)[0])
