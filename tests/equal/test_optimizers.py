"""Optimizers that need whole tensors or norms: any plan steps them as one device does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from meshwright import optim
from meshwright.comm.local import LocalWorld
from meshwright.compile import update as traced
from meshwright.program import update as updates
from meshwright.run.checkpoint.restore import open_checkpoint
from meshwright.run.equality.measure import Report
from meshwright.run.equality.verify import compare_step, verify_rank
from meshwright.run.optimizer import joint
from meshwright.run.persist import restore, save_worker
from tests.equal.cells import MODELS
from tests.equal.fused import FUSED
from tests.equal.harness import Case, assert_equal
from tests.equal.mixtures import mixtral
from tests.equal.optimizers import OPTIMIZERS, WHOLE, job_of, matrices
from tests.run.jobs import Net

PLANS = (
    "data=3", "zero1,data=2", "zero2,data=3,microbatches=2", "zero3,data=3", "tensor=2",
    "zero1,data=2,tensor=2", "zero3,data=2,tensor=2", "pipeline=2,microbatches=2",
    "zero1,data=2,pipeline=2,microbatches=2", "zero3,data=3,pipeline=2,microbatches=2",
    "zero3,data=4,shard=2",
)  # fmt: skip
SAMPLE = (
    ("lamb", "zero2,data=3,microbatches=2"), ("shampoo", "zero1,data=2"),
    ("adafactor", "zero3,data=3"), ("muon", "zero1,data=2,pipeline=2,microbatches=2"),
    ("a user's, traced", "tensor=2"), ("a user's, run whole", "zero3,data=3"),
)  # fmt: skip


@cache
def case(name):
    return Case(job_of(name))


@pytest.mark.parametrize(("name", "plan"), SAMPLE)
def test_a_plan_steps_it_as_one_device_does(name, plan):
    assert_equal(case(name).verify(plan, steps=3))


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "plan"), [*itertools.product(OPTIMIZERS, PLANS)])
def test_every_plan_steps_every_one_as_one_device_does(name, plan):
    assert_equal(case(name).verify(plan, steps=4))


def stepped(name, plan, steps=2):
    """The traces of an optimizer after some steps, and the workers."""
    mine = case(name)
    build = mine.build(plan)
    workers = mine.workers(build)
    played = mine.reference(build)
    world = LocalWorld(len(workers))
    world.perform([verify_rank(w, played, steps, Report()) for w in workers])
    return build.traces, workers


@pytest.mark.matrix
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_what_cannot_be_traced_is_run_on_whole_tensors(name):
    traces, workers = stepped(name, "zero1,data=2")
    assert bool(traces.whole) == (name in WHOLE)
    assert bool(traces.found) == (name not in WHOLE) or not any(traces.found.values())
    for worker in workers:
        assert set(worker.state.joint.parameters) <= {"up.weight", "down.weight", "up.bias"}
        assert worker.state.joint.parameters


@pytest.mark.matrix
def test_fused_weights_of_unequal_parts_are_stepped_whole():
    made = replace(FUSED["uneven"](1), optimizer=OPTIMIZERS["lamb"])
    assert_equal(Case(made).verify("zero1,data=2,tensor=2", steps=2))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["lamb", "adafactor"])
@pytest.mark.parametrize(
    ("model", "plan"),
    [("gpt, dropout", "zero1,data=2,context=2"), ("mixtral", "zero1,data=2,expert=2")],
)
def test_axes_of_sequences_and_experts(model, plan, name):
    made = mixtral() if model == "mixtral" else replace(MODELS[model](Path()), batch_size=8)
    assert_equal(Case(replace(made, optimizer=OPTIMIZERS[name])).verify(plan, steps=2))


def lr_is_not_an_input(patch):
    """The learning rate of the first step, for good."""
    patch.setattr(traced, "FOLLOWED", ())
    patch.setattr(joint, "FOLLOWED", ("lr",))


def norms_are_of_the_shard(patch):
    """The whole program runs on a shard as if that were all."""
    real = updates.update_program

    def alone(program, axes, coordinates, layouts):
        local = real(program, axes, coordinates, layouts)
        ops = [
            replace(op, name="aten.clone.default", args=op.args[:1], kwargs=())
            if op.name == "comm.all_reduce"
            else op
            for op in local.program.ops
        ]
        return replace(local, program=replace(local.program, ops=tuple(ops)))

    patch.setattr(joint, "update_program", alone)


def the_count_of_steps_is_not_an_input(patch):
    """The state's number is that of the step that was traced."""
    real = joint.Traces.of

    def of(self, settings, form, inputs):
        return real(self, settings, form, {**inputs, **{k: 1 for k in inputs if "state" in k}})

    patch.setattr(joint.Traces, "of", of)
    patch.setattr(
        traced.Update, "host", lambda self, inputs, real=traced.Update.host: real(
            self, {k: 1 if "state" in k else v for k, v in inputs.items()}
        )
    )  # fmt: skip


MUTATIONS = [
    ("lamb", "zero1,data=2", lr_is_not_an_input, {"weights"}),
    ("lamb", "zero1,data=2", norms_are_of_the_shard, {"weights"}),
    ("lamb", "zero1,data=2", the_count_of_steps_is_not_an_input, {"weights"}),
    *(
        pytest.param(*more, norms_are_of_the_shard, {"weights"}, marks=pytest.mark.matrix)
        for more in (("adafactor", "zero3,data=3"), ("lamb", "tensor=2"), ("lars", "zero1,data=2"))
    ),
]


@pytest.mark.parametrize(("name", "plan", "slip", "shows"), MUTATIONS)
def test_a_slip_shows(name, plan, slip, shows, monkeypatch):
    slip(monkeypatch)
    report = Case(job_of(name)).verify(plan, steps=3)
    assert shows <= set(report.failing)


CHECKPOINTS = ("zero1,data=2", "zero3,data=3", "tensor=2", "pipeline=2,microbatches=2", "data=2",
               "zero3,data=2,tensor=2")  # fmt: skip
LOADED = (
    ("adafactor", "zero3,data=3", "tensor=2"), ("shampoo", "zero1,data=2", "data=2"),
    ("a user's, run whole", "data=2", "zero3,data=3"),
)  # fmt: skip


def goes_on(name, before, after, tmp_path):
    mine = case(name)
    one, two = (mine.build(plan) for plan in (before, after))
    writers, readers = mine.workers(one), mine.workers(two)
    _run(mine, one, writers, 2)
    LocalWorld(len(writers)).perform([save_worker(w, tmp_path, 2, {}, 3) for w in writers])
    with open_checkpoint(next(tmp_path.glob("step-*"))) as checkpoint:
        for reader in readers:
            restore(reader, checkpoint)
    return two, readers


def _run(mine, build, workers, steps, start=0):
    def body(worker):
        for step in range(start, steps):
            yield from worker.step(worker.fetch(step), None)

    LocalWorld(len(workers)).perform([body(worker) for worker in workers])


@pytest.mark.parametrize(("name", "before", "after"), LOADED)
def test_its_state_is_read_under_another_plan(name, before, after, tmp_path):
    loads(name, before, after, tmp_path)


def loads(name, before, after, tmp_path):
    mine = case(name)
    build, readers = goes_on(name, before, after, tmp_path)
    _run(mine, build, readers, 3, start=2)
    wanted = mine.reference(build).after(2)
    for reader in readers:
        report = Report()
        compare_step(reader, wanted.loss, replace(wanted, gradients={}), 2, report)
        assert report.passed, report.worst


@pytest.mark.matrix
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(CHECKPOINTS, 2)])
def test_its_state_is_read_under_every_other_plan(name, before, after, tmp_path):
    loads(name, before, after, tmp_path)


def test_a_shard_of_each_factor_is_all_that_a_rank_holds():
    """Shampoo's moments of 40 rows, 12800 bytes, lie in two halves; what is small is whole."""
    _, workers = stepped("shampoo", "zero1,data=2")
    for worker in workers:
        state = worker.state.optimizer.state[worker.state.shards["up.weight"]]
        assert state["rows"].shape == state["rows_root"].shape == (20, 40)
        assert state["columns"].shape == (8, 8)
        assert state["momentum_buffer"].shape == (20, 8)


def test_parameters_that_are_not_split_are_stepped_by_the_class_itself():
    assert {n for n, _ in Net().named_parameters()} == {
        "up.weight", "up.bias", "down.weight", "down.bias"
    }  # fmt: skip
    _, (worker, _) = stepped("lamb", "zero1,data=2")
    assert "down.bias" not in worker.state.joint.parameters
    whole = worker.state.optimizer.state[worker.state.shards["down.bias"]]
    assert whole["step"] == 2


def test_ours_are_plain_torch_optimizers():
    model = Net()
    made = optim.LAMB(matrices(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.up.weight.detach().clone()
    made.step()
    assert not torch.equal(before, model.up.weight)
    assert made.state_dict()["state"][0]["step"] == 1
