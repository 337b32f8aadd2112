"""The checkpoint matrix: what any of twelve plans saved, every other goes on from.

So do plans that split a mixture's experts; and each foreign format brings it back bit by bit.

Each plan saves after two steps. Every other loads that, saves it again (the same bits), takes one
step, and has the loss, weights and optimizer state that one device has from the same checkpoint.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from examples import gpt
from meshwright.job import Job
from meshwright.run.checkpoint.save import open_checkpoint
from meshwright.run.foreign.convert import FORMATS, convert, open_source
from meshwright.run.foreign.source import kind
from tests.equal.mixtures import mixtral
from tests.run.foreign.things import bits
from tests.run.jobs import alone, losses, on_ranks

PLANS = (
    "data=1",
    "data=4,microbatches=2",
    "zero1,data=2,offload=disk",
    "zero2,data=3,offload=host",
    "zero3,data=4,shard=2",
    "tensor=2",
    "zero3,data=2,tensor=2",
    "context=2",
    "zero1,data=2,pipeline=2,microbatches=2,offload=optimizer:disk+params",
    "zero3,data=2,pipeline=2,virtual=2,schedule=interleaved,microbatches=2",
    "tensor=2,pipeline=2,schedule=zb-h1,microbatches=2",
    "pipeline=2,schedule=pipedream",
)
SAMPLE = ((8, 5), (4, 8))  # after, before
OF_EXPERTS = (
    "data=1",
    "expert=2",
    "zero3,data=2,expert=2",
    "zero1,expert=2,data=2,offload=disk",
    "expert=2,pipeline=2",  # one micro-batch: experts are balanced over a whole one
)
FOREIGN = [form for form in FORMATS if form != "meshwright"]


@cache
def made() -> Job:
    """The example's GPT, small.

    Nothing is tied or clipped: in an asynchronous pipeline each stage updates by itself.
    """
    text = Path(gpt.__file__).read_bytes()
    return Job(
        model=lambda: gpt.GPT(2, 16, 8),
        loss=gpt.loss,
        optimizer=lambda model: gpt.optimizer(model, 1e-3),
        data=lambda: gpt.Windows(text, 8),
        batch_size=12,
        schedule=lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    )


@cache
def mixture() -> Job:
    return mixtral()


def ranks(plan, body, of=made):
    return on_ranks(of(), plan, body, dtype=torch.float64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By plan and job, the folder it saved to; made when first asked for."""
    found = {}

    def of(plan, job=made):
        if (plan, job) not in found:
            found[plan, job] = folder = tmp_path_factory.mktemp("saved")

            def body(session):
                losses(session, 2)
                return session.save(folder)

            ranks(plan, body, job)
        return found[plan, job]

    return of


def state_of(root, step):
    with open_checkpoint(root / f"step-{step:08d}") as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}


def check_equal(found, want):
    """The same entries; equal up to the order of sums."""
    assert found.keys() == want.keys()
    assert any(name.startswith("optimizer/exp_avg/") for name in want)
    for name, tensor in want.items():
        error = (found[name] - tensor).abs().max() if tensor.numel() else torch.zeros(())
        assert error <= 1e-10 * max(1e-3, float(tensor.abs().max())), name


def check_loads(plan, before, saved, tmp_path, of=made):
    """Go on under `plan` from what each of `before` saved."""
    want = {}
    for number, other in enumerate(before):
        session = alone(of(), dtype=torch.float64)
        session.resume(saved(other, of))
        (loss,) = losses(session, 1)
        session.save(tmp_path / f"want{number}")
        want[other] = loss

    def body(session):
        for number, other in enumerate(before):
            assert session.resume(saved(other, of)) is not None
            session.save(tmp_path / f"again{number}")
            assert losses(session, 1) == pytest.approx([want[other]], rel=1e-10)
            session.save(tmp_path / f"went{number}")

    ranks(plan, body, of)
    for number, other in enumerate(before):
        first, again = state_of(saved(other, of), 2), state_of(tmp_path / f"again{number}", 2)
        assert first.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
        check_equal(
            state_of(tmp_path / f"went{number}", 3), state_of(tmp_path / f"want{number}", 3)
        )


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("after", "before"), SAMPLE)
def test_a_plan_goes_on_from_what_another_saved(after, before, saved, tmp_path):
    check_loads(PLANS[after], [PLANS[before]], saved, tmp_path)


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", PLANS)
def test_every_plan_goes_on_from_what_every_other_saved(after, saved, tmp_path):
    check_loads(after, [plan for plan in PLANS if plan != after], saved, tmp_path)


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", OF_EXPERTS)
def test_plans_of_experts_go_on_from_each_other(after, saved, tmp_path):
    before = [plan for plan in OF_EXPERTS if plan != after]
    check_loads(after, before, saved, tmp_path, mixture)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=() if p == PLANS[8] else pytest.mark.matrix) for p in PLANS]
)
def test_every_format_brings_back_what_a_plan_saved(plan, saved, tmp_path):
    root = saved(plan)
    want = state_of(root, 2)
    assert any(name.startswith("optimizer/") for name in want)
    for form in FOREIGN:
        convert(open_source(root / "step-00000002"), tmp_path / form, form)
        there = open_source(tmp_path / form)
        assert there.format == form
        convert(there, tmp_path / f"{form}-back" / "step-00000002", "meshwright")
        back = state_of(tmp_path / f"{form}-back", 2)
        assert back.keys() == {name for name in want if kind(name) in FORMATS[form]}
        for name, tensor in back.items():
            assert bits(tensor) == bits(want[name]), name
