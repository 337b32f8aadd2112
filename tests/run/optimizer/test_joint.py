"""Steps that ranks take jointly: which, by what, and what they send."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn, optim

from meshwright import optim as ours
from meshwright.errors import UserCodeError
from meshwright.plan.plan import Plan
from meshwright.run.describe import explain
from meshwright.run.optimizer import joint
from meshwright.run.prepare import prepare
from tests.equal.optimizers import OPTIMIZERS, Normalized
from tests.run.jobs import Net, alone, job, losses, on_ranks, step


def lamb(model):
    return ours.LAMB(model.parameters(), lr=0.02)


def worker_after(made, plan, steps=2):
    def body(session):
        losses(session, steps)
        return session.worker

    return on_ranks(made, plan, body)


@pytest.mark.parametrize("plan", ["data=2", "zero1,data=1"])
def test_what_no_plan_splits_is_stepped_by_the_class_alone(plan):
    build = prepare(job(optimizer=lamb), Plan.parse(plan), Plan.parse(plan).ranks)
    assert build.traces is None


def test_elementwise_ones_are_too():
    assert prepare(job(), Plan.parse("zero1,data=2"), 2).traces is None


class Deep(nn.Module):
    """Many layers alike."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x):
        x = self.up(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.down(x)


def test_parameters_alike_share_a_trace_and_a_program():
    worker, _ = worker_after(job(model=Deep, optimizer=lamb), "zero1,data=2", steps=3)
    traces, mine = worker.build.traces, worker.state.joint
    assert set(mine.parameters) == {f"layers.{k}.weight" for k in range(4)}
    assert [len(found) for found in traces.found.values()] == [1, 1]  # the first step, and others
    assert len(mine.ready) == 2


def test_a_change_of_the_rate_traces_nothing_and_of_another_setting_does():
    def body(session):
        counts = []
        for change in ({}, {}, {"lr": 0.5}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.7}):
            for group in session.worker.state.optimizer.param_groups:
                group.update(change)
            step(session)
            counts.append(sum(map(len, session.build.traces.found.values())))
        return counts

    counts, _ = on_ranks(job(optimizer=lamb), "zero1,data=2", body)
    assert counts == [1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        # Of up.weight, 40 x 8 in float32, in two halves.
        ("lamb", [("all_reduce", 2, 8)]),
        ("muon", [("all_gather", 1, 320)]),  # in bfloat16
        ("a user's, run whole", [("all_gather", 2, 1280)]),
    ],
)
def test_what_a_step_sends_is_foretold(name, sent):
    told = explain(job(optimizer=OPTIMIZERS[name]), Plan.parse("zero1,data=2"), 2)
    rows = [r for r in told["collectives"] if r["value"] == "the optimizer's step"]
    assert [(r["op"], r["count"], r["bytes"]) for r in rows] == sent
    assert {r["phase"] for r in rows} == {"finish"}


def matrix(*values):
    return pytest.param(*values, marks=pytest.mark.matrix)


@pytest.mark.parametrize("name", ["shampoo", matrix("lamb"), matrix("adafactor"), matrix("muon")])
def test_what_the_state_holds_is_foretold(name):
    made = job(optimizer=OPTIMIZERS[name])
    told = explain(made, Plan.parse("zero1,data=2"), 2)["memory"]
    for worker in worker_after(made, "zero1,data=2"):
        state = worker.state
        held = sum(
            tensor.nbytes
            for name in state.joint.parameters
            for tensor in state.optimizer.state[state.shards[name]].values()
            if isinstance(tensor, torch.Tensor)
        )
        foretold = told[worker.rank]["parts"]["optimizer"]
        alone_ = [s for n, s in state.shards.items() if n not in state.joint.parameters]
        slots = worker.build.recipe.slots() * sum(s.nbytes for s in alone_)
        assert foretold == held + slots


def test_the_plan_tells_what_is_gathered_and_why():
    made = job(optimizer=OPTIMIZERS["a user's, run whole"])
    told = explain(made, Plan.parse("zero1,data=2"), 2)["optimizer"]
    assert (told["class"], told["jointly"], told["gathered"]) == ("Normalized", 1, 1)
    (why,) = told["because"]
    assert why.startswith(f"{Normalized.__init__.__code__.co_filename}:")
    assert "a branch depends on a number read from a tensor" in why


class Counting(optim.Optimizer):
    """Counts its calls in its group, and divides by a norm that it branches on."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                if p.grad is not None and p.grad.norm() > 0:
                    p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


def test_what_depends_on_how_often_it_is_called_is_refused():
    made = job(optimizer=lambda m: Counting(m.parameters()))
    with pytest.raises(UserCodeError, match=r"changes its group's setting 'calls'.*--eager"):
        on_ranks(made, "zero1,data=2", step)
    step(alone(made))


def test_a_class_that_replaces_tensors_steps_the_rows_of_a_whole():
    """`p.data = ...` on the part of a replicated weight that zero1 steps here."""

    class Replacing(optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data = p.data - group["lr"] * p.grad

    def weights(session):
        losses(session, 2)
        return session.worker.state.values["model/up.weight"].clone()

    made = job(optimizer=lambda m: Replacing(m.parameters(), lr=0.1))
    plain = replace(made, optimizer=lambda m: optim.SGD(m.parameters(), lr=0.1))
    found = on_ranks(made, "zero1,data=2", weights)
    wanted = on_ranks(plain, "zero1,data=2", weights)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found[0], Net().up.weight)


def test_state_made_over_shards_is_no_state():
    """A class that makes matrices of its parameters' sides at once would make a shard's."""

    class Eager(ours.Shampoo):
        def __init__(self, params, **how):
            super().__init__(params, **how)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p] |= {"step": 0, "momentum_buffer": torch.zeros_like(p)}
                    if p.dim() > 1:
                        self.state[p]["rows"] = group["eps"] * torch.eye(p.shape[0])

    made = job(optimizer=lambda m: Eager(m.parameters(), largest=64))
    worker, _ = worker_after(made, "zero1,data=2")
    assert joint.Joint.layout(worker.state.joint, "up.weight", "rows", torch.zeros(()))[0] == (
        40,
        40,
    )
