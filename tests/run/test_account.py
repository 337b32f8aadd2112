"""Counted, not timed: what ranks hold is what the formulas and the bill say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.predict.staged import most_held
from meshwright.run.account import Account, away_of, state_of
from meshwright.run.bill import SLACK, bill_of
from meshwright.run.form import first_micros
from meshwright.run.meter import Meter
from tests.equal.cells import example
from tests.equal.harness import Case
from tests.run.jobs import job, on_ranks

WIDTH, STEPS, MIB = 64, 2, 1 << 20


@cache
def gpt():
    """Most of it is matrices that divide."""
    return example("gpt").job(depth=2, width=WIDTH, context=16, batch=8)


def held(plan, made=None):
    """Of each rank after some steps: its account, its bill, and how many weights the model has."""

    def body(session):
        fetched = session.take()
        meter = Meter()
        for _ in range(STEPS):
            session.worker.meter = meter
            session.run_step()
        build = session.build
        count = sum(p.numel() for p in build.model.parameters.values())
        bill = bill_of(build, fetched.micros)[session.worker.rank]
        found = state_of(session.worker), away_of(session.worker), meter, bill, count
        session.close()
        return found

    return on_ranks(made or gpt(), plan, body)


def formula(zero, precision, ranks, count):
    """Bytes of weights, gradients and AdamW's moments (Rajbhandari 2020, figure 1)."""
    each = 2 if precision == "bf16-pure" else 4
    return {
        "weights": each * count / (ranks if zero == 3 else 1),
        "gradients": each * count / (ranks if zero >= 2 else 1),
        "optimizer": 2 * each * count / (ranks if zero >= 1 else 1),
    }


SAMPLE = {(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (3, "bf16-pure")}
CELLS = [
    pytest.param(zero, precision, marks=() if (zero, precision) in SAMPLE else pytest.mark.matrix)
    for zero in range(4)
    for precision in ("float32", "bf16-pure", "bf16", "fp16")
]


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_state_is_within_a_twentieth_of_the_formula(zero, precision):
    stage = f"zero{zero}," if zero else ""
    for state, away, meter, bill, count in held(f"{stage}data=2,precision={precision}"):
        wanted = formula(zero, precision, 2, count)
        assert not away
        if zero != 1:  # whose sums are sharded as they are reduced, where there is one micro-batch
            assert bill["parts"]["gradients"] == pytest.approx(wanted["gradients"], rel=0.05)
        for part in ("weights", "optimizer"):
            assert state[part] == pytest.approx(wanted[part], rel=0.05), part
            assert bill["parts"][part] == pytest.approx(wanted[part], rel=0.05), part
        assert meter.gradients > 0


@pytest.mark.parametrize(
    ("zero", "tier"),
    [
        (3, "host"),
        pytest.param(0, "disk", marks=pytest.mark.matrix),
        pytest.param(0, "host", marks=pytest.mark.matrix),
        pytest.param(3, "disk", marks=pytest.mark.matrix),
    ],
)
def test_what_is_offloaded_is_away_and_nothing_of_it_here(zero, tier, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stage = f"zero{zero}," if zero else ""
    for state, away, _, bill, count in held(f"{stage}data=2,offload={tier}"):
        whole = sum(formula(zero, "float32", 2, count).values())
        share = formula(max(zero, 2), "float32", 2, count)["gradients"] if zero else 0
        assert state["weights"] == state["optimizer"] == 0
        assert bill["parts"]["weights"] == bill["parts"]["optimizer"] == 0
        assert away[tier] >= 0.95 * (whole - share if zero else whole)
        assert away[tier] == pytest.approx(bill["away"][tier], rel=0.05)


def test_an_average_counts_and_a_pipeline_holds_its_stages_alone():
    made = replace(gpt(), ema=0.9)
    ((state, _, _, bill, count),) = held("data=1", made)
    assert state["average"] == bill["parts"]["average"] == 4 * count
    ranks = held("pipeline=2,microbatches=2")
    assert sum(state["weights"] for state, *_ in ranks) == 4 * ranks[0][4]
    for state, _, _, bill, _ in ranks:
        assert state["weights"] == bill["parts"]["weights"]
        assert state["optimizer"] == bill["parts"]["optimizer"]


def test_the_meter_sees_what_the_list_holds():
    """Between segments: what the forward saved, and one set of gradients at the end."""
    ((_, _, meter, bill, count),) = held("data=1")
    assert meter.gradients == pytest.approx(4 * count, rel=0.01)
    saved = bill["parts"]["saved activations"]
    assert 0.5 * saved < meter.activations <= 1.3 * saved
    assert meter.most >= max(meter.activations, meter.gradients)
    assert not meter.alive["activation"] + meter.alive["gradient"]


def test_the_bill_comes_to_its_parts():
    ((_, _, _, bill, _),) = held("data=1")
    parts, beside = bill["parts"], bill["beside"]
    state = parts["weights"] + parts["optimizer"] + parts["buffers"]
    comes = bill["peak"] - state - sum(beside.values())
    assert beside["slack"] == int(SLACK * comes)
    assert max(parts["gradients"], parts["saved activations"]) <= comes
    assert beside["communication buffers"] == 0
    assert bill["saving"] == parts["weights"] + parts["optimizer"]


def test_gathered_weights_pass_through_memory_where_their_parts_are_columns():
    """Rows are gathered straight into the weights."""

    class Weight(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(shape))

        def forward(self, x):
            return self.w * x.sum()

    def peak(*shape):
        made = job(model=lambda: Weight(*shape), loss=lambda m, batch: m(batch["x"]).mean())
        build = Case(made).build("zero1,data=3", None)
        compiled = build.lowered(0, first_micros(build)).compiled
        return most_held(compiled, {"model/w": 3 * MIB}).peak

    between = peak(512, 1536) - peak(1536, 512)
    assert 3 * MIB <= between <= 4 * MIB


def test_ranks_that_share_memory_count_it():
    alone = held("data=2", job())[0][3]["beside"]["communication buffers"]
    assert alone == pytest.approx(2 * 4 * (3 << 18), abs=1 << 16)


PEAK = """
import mmap
from meshwright.run.observe.resident import forget_peak, resident

before = resident()
assert before is not None
with mmap.mmap(-1, 1 << 26, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
    memory.write(b"x" * (1 << 26))
    assert resident().private >= before.private + (1 << 26) - (1 << 22)
assert resident().peak >= before.private + (1 << 26) - (1 << 22)
if forget_peak():
    assert resident().peak < before.private + (1 << 26), (before, resident())
"""


def test_the_kernel_tells_the_peak_since_it_was_forgotten():
    """In a process of its own: what other tests' threads take and give back is not counted."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_an_account_is_what_was_resident_less_what_is_known():
    def body(session):
        account = Account(session)
        session.worker.lowered(session.take())
        account.ready()
        for _ in range(STEPS):
            account.begins()
            session.run_step()
            account.ended()
        return account.told()

    (told,) = on_ranks(gpt(), "data=1", body)
    assert told["process"] > 1 << 26
    known = told["process"] + sum(told["parts"].values())
    assert told["peak"] >= told["process"]
    assert told["rest"] == max(0, told["peak"] - known)
    assert Path("/proc/self/status").exists()
