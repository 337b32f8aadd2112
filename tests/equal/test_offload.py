"""Offload: the numbers of one device whatever rests where, and as many bytes moved as there are."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from meshwright.comm.local import LocalWorld
from meshwright.optim import LAMB
from meshwright.run.bill import away
from meshwright.run.offload.disk import Disk
from meshwright.run.offload.kept import Kept
from meshwright.run.offload.store import Store
from tests.equal import odd
from tests.equal.cells import MODELS, example
from tests.equal.harness import Case, assert_equal

STEPS = 3
PLANS = (
    "data=2",
    "zero1,data=2",
    "zero2,data=2,microbatches=3",
    "zero3,data=2,microbatches=2",
    "data=1,tensor=2",
    "zero3,data=2,pipeline=2,microbatches=2",
    "zero1,data=1,pipeline=2,microbatches=4,schedule=zb-h1",
    "zero3,data=2,precision=bf16",
    "zero3,data=2,remat=full",
)
REST = (
    "host",
    "disk",
    "optimizer",
    "optimizer:disk",
    "gradients",
    "gradients:disk",
    "params",
    "params:disk",
    "optimizer:disk+gradients+params",
)
SAMPLE = [(plan, REST[k % len(REST)]) for k, plan in enumerate(PLANS) if k in (4, 5, 7)]


@cache
def case(name):
    return Case(MODELS[name](Path()))


@cache
def one(name):
    """Tied weights; an optimizer of whole tensors; clipped gradients."""
    made = {
        "tied": lambda: odd.job(odd.Tied, "tokens", loss=odd.next_token),
        "lamb": lambda: odd.job(odd.Plain, optimizer=lambda m: LAMB(m.parameters(), lr=1e-2)),
        "clipped": lambda: odd.job(odd.Plain, clip_norm=0.1),
        "sgd": lambda: odd.job(odd.Plain, optimizer=momentum),
    }
    return Case(made[name]())


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def verify(which, plan, offload, steps=STEPS):
    assert_equal(which.verify(f"{plan},offload={offload}", steps))


@pytest.mark.parametrize(("plan", "offload"), SAMPLE)
def test_an_offloaded_plan_is_one_device(plan, offload):
    verify(case("gpt, dropout"), plan, offload)


@pytest.mark.matrix
@pytest.mark.parametrize(("plan", "offload"), list(itertools.product(PLANS, REST)))
@pytest.mark.parametrize("model", ["gpt, dropout", "gpt", "finetune"])
def test_and_every_pair_of_them(model, plan, offload):
    verify(case(model), plan, offload)


@pytest.mark.parametrize("rest", [pytest.param("host", marks=pytest.mark.matrix), "disk"])
@pytest.mark.parametrize(("name", "plan"), [
    ("tied", "data=2,pipeline=2,microbatches=2"), ("lamb", "zero3,data=2"),
    ("lamb", "zero1,data=2"), ("clipped", "zero2,data=2,microbatches=2"), ("sgd", "zero3,data=3"),
])  # fmt: skip
def test_so_are_tied_weights_clipped_gradients_and_other_optimizers(name, plan, rest):
    verify(one(name), plan, rest)


def run(which, plan, steps=STEPS):
    """The workers after some steps, and per step what rank 0 had moved since the one before."""
    build = which.build(plan, torch.float32)
    workers, seen = which.workers(build), []

    def counts():
        state = workers[0].state
        tiers = {"optimizer": state.kept.tier, **(state.store.tiers if state.store else {})}
        found = {name: (t.moved.put, t.moved.fetched) for name, t in tiers.items() if t}
        return {**found, "step": (state.kept.moved.put, state.kept.moved.fetched)}

    def train(worker):
        fetched = yield from worker.agree_on_shapes(worker.fetch(0))
        for step in range(steps):
            yield from worker.step(fetched, step + 1)
            if worker.rank == 0:
                seen.append(counts())
            fetched = worker.ahead

    before = counts()
    LocalWorld(len(workers)).perform([train(worker) for worker in workers])
    each = [
        {k: tuple(b - a for a, b in zip(old[k], new[k], strict=True)) for k in new}
        for old, new in itertools.pairwise([before, *seen])
    ]
    for worker in workers:
        worker.close()
    return workers, each


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_optimizer_moves_its_state_once_each_way_from_a_disk_and_never_on_the_host(tier):
    workers, each = run(one("tied"), f"zero1,data=2,offload=optimizer:{tier}")
    held = sum(shard.nbytes for shard in workers[0].state.shards.values())
    state = 2 * held  # AdamW's two moments; its step count stays
    assert [step["step"] for step in each] == [(2 * held, held)] * STEPS
    later = (state, state) if tier == "disk" else (0, 0)
    assert [step["optimizer"] for step in each] == [(state, 0), later, later]


@pytest.mark.parametrize(("tier", "count"), [("host", 1), ("disk", 1), ("host", 3), ("disk", 3)])
def test_gradients_go_once_per_microbatch_and_come_back_to_be_added_to(tier, count):
    plan = f"data=1,microbatches={count},offload=gradients:{tier}"
    workers, each = run(one("tied"), plan)
    size = sum(shard.nbytes for shard in workers[0].state.shards.values())
    read = count - 1 + (tier == "disk")  # the step reads those on a disk
    assert [step["gradient"] for step in each] == [(count * size, read * size)] * STEPS


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_weights_come_for_the_forward_and_for_the_backward_of_each_microbatch(count):
    which = Case(example("gpt").job(depth=3, width=32, context=16, batch=12, dropout=0.0))
    workers, each = run(which, f"data=1,microbatches={count},offload=params")
    lists = next(iter(workers[0].build.lists.values())).compiled.instructions
    values = workers[0].state.values
    loads = [i.inputs[0] for i in lists.body if i.kind == "Load" and i.offloads]
    assert [step["model"][1] for step in each] == [sum(values[n].nbytes for n in loads)] * STEPS
    blocks = [n for n in loads if "blocks.1" in n]
    # The backward of a linear reads no bias.
    often = {n: 1 if n.endswith(".bias") and "norm" not in n else 2 for n in blocks}
    assert Counter(blocks) == {n: times * count for n, times in often.items()}


def left_out(patch):
    """The first weight that is loaded does not arrive."""
    real = Store.load

    def load(self, name):
        arrived = real(self, name)
        return (lambda: torch.zeros_like(arrived())) if name.endswith("up.weight") else arrived

    patch.setattr(Store, "load", load)


def late(patch):
    """State is written back a step late."""
    real, before = Disk.put, {}

    def put(self, place, tensor):
        if not place.name.startswith("optimizer"):
            return real(self, place, tensor)
        new = before.get((id(self), place.name), torch.zeros_like(tensor))
        before[id(self), place.name] = tensor.clone()
        return real(self, place, new)

    patch.setattr(Disk, "put", put)


def old(patch):
    """Weights do not return from the host."""
    patch.setattr(Kept, "_returned", lambda self, name, home: None)


def lost(patch):
    """A stash of a sum is left out after the first."""
    real = Store.stash

    def stash(self, name, tensor):
        if name.startswith("gradient/") and name in self.places:
            return self.places[name].rests
        return real(self, name, tensor)

    patch.setattr(Store, "stash", stash)


@pytest.mark.parametrize(("slip", "plan", "shows"), [
    (left_out, "zero3,data=2,offload=params", "loss"),
    (late, "data=2,offload=optimizer:disk", "optimizer"),
    (old, "data=2,offload=optimizer", "weights"),
    (lost, "data=2,microbatches=3,offload=gradients", "gradients"),
])  # fmt: skip
def test_a_transfer_left_out_or_late_shows(monkeypatch, slip, plan, shows):
    slip(monkeypatch)
    report = one("clipped").verify(plan, STEPS)
    assert report.worst[shows].error > 1e-6


def test_the_step_runs_the_fused_kernels():
    with torch.profiler.profile() as profile:
        run(one("tied"), "data=1,offload=optimizer", 1)
    assert any(event.key == "aten::_fused_adamw_" for event in profile.key_averages())


@pytest.mark.parametrize("plan", ["zero1,data=2", "data=2"])
def test_the_bill_of_what_is_away_is_what_tiers_hold(plan):
    workers, _ = run(one("tied"), f"{plan},offload=disk", 2)
    worker = workers[0]
    tiers = {worker.state.kept.tier, *worker.state.store.tiers.values()}
    told = away(worker.build, 0)
    assert told["disk"] == pytest.approx(sum(tier.bytes for tier in tiers), rel=0.05)
    kept = worker.state.kept
    passes = kept._steps.bytes + sum(read.staging.bytes for read in kept._sets)
    pages = 4096 * 3 * 4 * len(worker.state.shards)  # each buffer of each set begins on a page
    assert passes <= 1.05 * told["host"] + pages
