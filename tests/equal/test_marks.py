"""Marks, replicas, gathering once a step and searched orders: equal to one device too."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from tests.equal import families, odd
from tests.equal.harness import Case, assert_equal

STEPS = 2


class Marked(nn.Module):
    """Four layers, marked after the first and the third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            x = mw.cut(x) if number in (0, 2) else x
        return x


@cache
def marked():
    return Case(odd.job(lambda: odd.Plain(Marked())))


@cache
def gpt2():
    return Case(families.gpt2())


def layers_of(case, plan):
    """The pipeline ranks of the four layers' weights."""
    found = case.build(plan).homes
    return [where for name, where in found.items() if "layers" in name and "weight" in name]


@pytest.mark.parametrize("beside", ["", "tensor=2,", "data=2,"])
def test_stages_begin_at_marks(beside):
    plan = f"{beside}pipeline=3,schedule=zb-h1,microbatches=3"
    assert layers_of(marked(), plan) == [(0,), (1,), (1,), (2,)]
    assert_equal(marked().verify(plan, STEPS))


def test_of_more_marks_than_stages_the_better_ones_are_taken():
    assert layers_of(marked(), "pipeline=2") in ([(0,), (1,), (1,), (1,)], [(0,), (0,), (0,), (1,)])


def test_fewer_marks_than_stages_are_refused():
    with pytest.raises(PlanError, match=r"marked by mw.cut at 2 places; use 3 stages or fewer"):
        marked().build("pipeline=4")


REPLICATED = (
    "pipeline=2,replicas=2-1,microbatches=4",
    "pipeline=3,replicas=3-1-2,microbatches=5",
    "pipeline=2,replicas=1-2,tensor=2,schedule=gpipe,microbatches=3",
    "pipeline=2,replicas=2-1,microbatches=1,remat=full",
)


@pytest.mark.parametrize("plan", REPLICATED)
def test_replicas_of_a_stage_take_micro_batches_in_turn(plan):
    assert_equal(gpt2().verify(plan, STEPS))


def test_replicas_send_each_micro_batch_to_the_rank_that_takes_it():
    case = gpt2()
    build = case.build("pipeline=2,replicas=2-1,microbatches=4")
    workers = case.workers(build)
    lists = [w.lowered(w.fetch(0)).compiled.instructions.body for w in workers]
    forwards = [[(i.microbatch, i.peer) for i in body if i.kind == "Send"] for body in lists]
    assert forwards[0] == [(0, 2), (2, 2)]
    assert forwards[1] == [(1, 2), (3, 2)]
    assert sorted(forwards[2]) == [(0, 0), (1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize("plan", [
    "zero3,gather=step,data=2,pipeline=2,microbatches=3",
    "zero2,gather=step,data=2,pipeline=2,microbatches=3,schedule=zb-h1",
    "zero3,gather=step,data=2,microbatches=3",
])  # fmt: skip
def test_weights_gathered_once_a_step(plan):
    assert_equal(gpt2().verify(plan, STEPS))


@pytest.mark.parametrize(("gather", "times"), [("step", 1), ("microbatch", 6)])
def test_how_often_weights_are_gathered(gather, times):
    """Once, or in the forward and the backward of each of three micro-batches."""
    case = gpt2()
    build = case.build(f"zero3,gather={gather},data=2,pipeline=2,microbatches=3")
    worker = case.workers(build)[0]
    found = worker.lowered(worker.fetch(0)).compiled.instructions
    gathered = [
        dict(op.kwargs)["value"]
        for i in found.body
        if i.kind == "Start" and i.segment is not None
        for op in found.calls[i.segment]
        if op.name == "comm.all_gather"
    ]
    assert gathered.count("model/transformer.h.0.mlp.c_fc.weight") == times


@pytest.mark.parametrize("plan", ["pipeline=2,microbatches=4", "pipeline=3,microbatches=5"])
def test_a_searched_order(plan):
    assert_equal(gpt2().verify(f"{plan},schedule=search", STEPS))


OWN = ("0F0,0F1,0B0,0F2,0I1,0B2,0W1", "1F0,1B0,1F1,1I1,1F2,1B2,1W1")


def own(actions, microbatches=3):
    return Plan(pipeline=2, data=1, microbatches=microbatches, actions=actions)


def test_a_schedule_of_ones_own():
    assert_equal(gpt2().verify(own(OWN), STEPS))


WRONG = {
    "a ring of waits": (("0F0,0B0,0F1,0B1", "1F1,1F0,1B0,1B1"), 2, "deadlocks: rank 0 waits"),
    "a backward left out": (("0F0,0B0", "1F0"), 1, "1B0"),
    "no action": (("0F0,0X0", "1F0,1B0"), 1, "line 1, item 2: '0X0' is not an action"),
    "other micro-batches": (OWN, 4, "use microbatches=3"),
    "a line for each rank": (OWN[:1], 3, "actions of 1 line, but pipeline=2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_schedule_that_cannot_run_is_refused(name):
    actions, microbatches, message = WRONG[name]
    with pytest.raises(PlanError, match=message):
        gpt2().build(own(actions, microbatches))
