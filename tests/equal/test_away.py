"""Saved activations in host memory and on disk: one device's numbers, and less held here."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch

from meshwright.comm.local import LocalWorld
from meshwright.program import away
from meshwright.run.form import first_micros
from meshwright.run.offload.store import Store
from tests.equal.cells import MODELS
from tests.equal.harness import Case, assert_equal
from tests.schedule import test_held as held

PLANS = (
    "data=1",
    "zero3,data=2,microbatches=3",
    "data=1,tensor=2",
    "zero2,data=2,remat=full",
    "zero1,data=2,remat=selective",
    "zero3,data=2,pipeline=2,microbatches=4,schedule=gpipe",
    "zero1,data=2,pipeline=2,microbatches=3,schedule=1f1b",
    "data=1,pipeline=2,virtual=2,microbatches=4,schedule=interleaved",
    "data=1,pipeline=2,microbatches=4,schedule=zb-h1",
    "zero2,data=2,pipeline=2,microbatches=3,schedule=zb-v",
    "data=1,pipeline=2,microbatches=4,schedule=dualpipe-v",
    "data=1,pipeline=2,microbatches=2,schedule=1f1b,remat=full",
)
REST = ("activations", "activations:disk", "host", "disk")
NAMES = ("gpt, dropout", "digits", "finetune")
SAMPLE = [("gpt, dropout", plan, REST[k % 4]) for k, plan in enumerate(PLANS)][::2]
SAMPLE += [("digits", "zero1,data=2", "activations:disk")]


@pytest.fixture(autouse=True)
def all_go(monkeypatch):
    """Tiny models' values too."""
    monkeypatch.setattr(away, "LEAST", 0)


@cache
def case(name):
    return Case(MODELS[name](Path()))


@pytest.mark.parametrize(("name", "plan", "rest"), SAMPLE)
def test_values_that_were_away_are_one_devices(name, plan, rest):
    assert_equal(case(name).verify(f"{plan},offload={rest}", 2))


def legal(name, plan):
    """A batch norm's samples are not split into micro-batches."""
    return name != "digits" or "microbatches" not in plan


CELLS = [row for row in itertools.product(NAMES, PLANS, REST) if legal(*row[:2])]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "plan", "rest"), CELLS)
def test_and_so_under_every_plan(name, plan, rest):
    assert_equal(case(name).verify(f"{plan},offload={rest}", 3))


def moved(which, plan):
    """(bytes put, bytes fetched) on rank 0 in one step, and what the list says goes."""
    build = which.build(plan, torch.float32)
    workers = which.workers(build)
    lists = build.lowered(0, first_micros(build, which.data)).compiled.instructions
    forms = away.slots(lists)
    gone = [e.outputs[0] for e in lists.body if e.kind == "Stash" and e.offloads]
    LocalWorld(len(workers)).perform([w.step(w.fetch(0), None) for w in workers])
    (tier,) = {workers[0].state.store.tiers["away"]}
    for worker in workers:
        worker.close()
    return (tier.moved.put, tier.moved.fetched), sum(forms[name].bytes for name in gone), tier.bytes


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_as_many_bytes_come_back_as_went(tier):
    plan = f"data=1,pipeline=2,microbatches=4,offload=activations:{tier}"
    (put, fetched), wanted, _ = moved(case("gpt"), plan)
    assert put == fetched == wanted > 0


def test_what_a_rank_holds_between_forward_and_backward_falls():
    plain, less = (
        held.peaks(f"data=1,pipeline=2,microbatches=4,schedule=gpipe{rest}")
        for rest in ("", ",offload=activations")
    )
    assert less[0] < 0.25 * plain[0]


def wrong_one(patch):
    """A slot's value is that of the one before."""
    real, before = Store.stash, {}

    def stash(self, name, tensor):
        if not name.startswith("away/"):
            return real(self, name, tensor)
        old = before.get(tensor.shape, tensor)
        before[tensor.shape] = tensor.clone()
        return real(self, name, old)

    patch.setattr(Store, "stash", stash)


def not_loaded(patch):
    real = Store.load

    def load(self, name):
        arrived = real(self, name)
        return (lambda: torch.zeros_like(arrived())) if name.startswith("away/") else arrived

    patch.setattr(Store, "load", load)


@pytest.mark.parametrize("slip", [wrong_one, not_loaded])
def test_a_slip_shows(slip, monkeypatch):
    slip(monkeypatch)
    with pytest.raises(AssertionError):
        assert_equal(case("gpt").verify("data=1,pipeline=2,microbatches=4,offload=activations", 1))


def test_evaluation_needs_none_of_it():
    build = case("gpt").build("data=1,offload=activations")
    micros = first_micros(build, case("gpt").data)[:1]
    lists = build.lowered(0, micros, training=False).compiled.instructions
    assert not away.slots(lists)
