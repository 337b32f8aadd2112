"""Whether a plan fits: each check's wording, and that remedies work."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.check import CHECKS, RUNS, Facts, check, require
from meshwright.plan.plan import KEYS, Plan

sizes = st.integers(1, 40)


@pytest.mark.parametrize(
    ("plan", "facts", "message"),
    [
        (
            Plan(data=3, pipeline=2),
            Facts(4),
            (
                "plan asks for data=3 x pipeline=2 = 6 ranks, but the world has 4; "
                "use data=2, or start 6 ranks"
            ),
        ),
        (
            Plan(data=2, attention="ring"),
            Facts(2),
            (
                "plan asks for attention=ring, but sequences are whole with context=1; "
                "use context=2 or more, or drop attention"
            ),
        ),
        (
            Plan(data=3),
            Facts(4),
            "plan asks for data=3 = 3 ranks, but the world has 4; use data=4, or start 3 ranks",
        ),
        (
            Plan(data=1, tensor=3),
            Facts(4),
            "plan asks for data=1 x tensor=3 = 3 ranks, but the world has 4; start 3 ranks",
        ),
        (
            Plan(data=2, microbatches=9),
            Facts(2, batch_size=8),
            (
                "microbatches=9 splits batch_size=8 so that some have none, but data=2 needs at "
                "least 2 in each; use microbatches=4 or fewer, or batch_size=18 or more"
            ),
        ),
        (
            Plan(data=3, microbatches=4),
            Facts(3, batch_size=10),
            (
                "microbatches=4 splits batch_size=10 so that the smallest has 2, but data=3 needs "
                "at least 3 in each; use microbatches=3 or fewer, or batch_size=12 or more"
            ),
        ),
        (
            Plan(data=16),
            Facts(16, batch_size=8),
            (
                "batch_size=8 has fewer samples than data=16 has ranks; use data=8 or fewer, "
                "or batch_size=16 or more"
            ),
        ),
        (
            Plan(data=4, expert=4),
            Facts(16, batch_size=8),
            (
                "batch_size=8 has fewer samples than data=4 x expert=4 has ranks; use data=2 or "
                "fewer, or batch_size=16 or more"
            ),
        ),
        (
            Plan(data=1, microbatches=4),
            Facts(1, batch_size=8, normalize_over=4),
            (
                "normalize_over=4, but microbatches=4 would split batch_size=8 otherwise; "
                "use microbatches=2"
            ),
        ),
        (
            Plan(data=1, microbatches=4),
            Facts(1, batch_size=8, normalizes=True),
            (
                "batch norm shares the statistics of the whole batch_size=8, but microbatches=4 "
                "would split batch_size=8 otherwise; use microbatches=1, or say normalize_over=2 "
                "in the job, which changes the model's numbers"
            ),
        ),
        (
            Plan(data=1, precision="bfloat16"),
            Facts(1),
            (
                "plan asks for precision=bfloat16, but this version runs precision=float32 or "
                "precision=bf16 only; write precision=bf16"
            ),
        ),
        (
            Plan(data=1, precision="fp16"),
            Facts(1),
            (
                "plan asks for precision=fp16, but this version runs precision=float32 or "
                "precision=bf16 only; use precision=bf16, which has float32's range and needs no "
                "loss scaling"
            ),
        ),
        (
            Plan(data=1, precision="fp8"),
            Facts(1),
            (
                "plan asks for precision=fp8, but this version runs precision=float32 or "
                "precision=bf16 only; drop precision"
            ),
        ),
        (
            Plan(data=1, gather="step"),
            Facts(1),
            "plan asks for gather=step, but this version runs its default only; drop gather",
        ),
        (
            Plan(data=1, cuts=("a",)),
            Facts(1),
            "plan has cuts, but this version runs plans without; drop cuts",
        ),
    ],
)
def test_wording(plan, facts, message):
    assert message in [str(problem) for problem in check(plan, facts)]
    with pytest.raises(PlanError) as caught:
        require(plan, facts)
    assert message in str(caught.value)


@pytest.mark.parametrize("zero", range(4))
def test_every_zero_level_runs_at_any_data_size(zero):
    assert check(Plan(data=1, zero=zero), Facts(1, batch_size=1)) == ()
    assert check(Plan(data=4, zero=zero, microbatches=2), Facts(4, batch_size=8)) == ()


def test_all_problems_are_named_at_once():
    with pytest.raises(PlanError) as caught:
        require(Plan(data=3, offload="cpu", remat="full", microbatches=9), Facts(4, batch_size=8))
    lines = str(caught.value).splitlines()
    assert lines[0] == "plan has 4 problems:"
    assert len(lines) == 5
    assert all(line.startswith("  - ") for line in lines[1:])


def test_every_key_that_is_not_run_yet_is_a_key():
    assert set(RUNS) < set(KEYS)
    default = Plan()
    assert all(default.value(key) in runs for key, runs in RUNS.items())


@pytest.mark.parametrize("key", sorted(RUNS))
def test_other_values_of_a_key_that_is_not_run_yet_are_refused(key):
    other = {"gather": "step"}.get(key, 2 if isinstance(RUNS[key][0], int) else "other")
    plan = dataclasses.replace(Plan(data=1), **{key: other})
    (problem,) = CHECKS["version"](plan, Facts(1))
    assert f"{key}={other}" in problem.message
    assert key in problem.remedy


@given(world=sizes, data=sizes, tensor=st.integers(1, 6))
def test_the_remedy_for_a_world_fits(world, data, tensor):
    plan = Plan(data=data, tensor=tensor)
    problems = CHECKS["world"](plan, Facts(world))
    assert bool(problems) == (data * tensor != world)
    for problem in problems:
        offered = re.search(r"use data=(\d+)", problem.remedy)
        assert bool(offered) == (world % tensor == 0)
        if offered:
            fits = dataclasses.replace(plan, data=int(offered[1]))
            assert CHECKS["world"](fits, Facts(world)) == ()
        start = re.search(r"start (\d+) rank", problem.remedy)
        assert CHECKS["world"](plan, Facts(int(start[1]))) == ()


@given(batch=sizes, parts=sizes, data=sizes)
def test_the_remedies_for_samples_fit(batch, parts, data):
    plan, facts = Plan(data=data, microbatches=parts), Facts(data, batch_size=batch)
    find = CHECKS["samples"]
    problems = find(plan, facts)
    assert bool(problems) == (batch // parts < data)
    for problem in problems:
        key, fewer = re.search(r"use (\w+)=(\d+) or fewer", problem.remedy).groups()
        parts_left = 1 if "and microbatches=1" in problem.remedy else parts
        changed = dataclasses.replace(plan, **{"microbatches": parts_left, key: int(fewer)})
        assert find(changed, facts) == ()
        larger = re.search(r"batch_size=(\d+) or more", problem.remedy)[1]
        assert find(plan, Facts(data, batch_size=int(larger))) == ()


@given(groups=st.integers(1, 8), parts=sizes, group=st.integers(1, 8), stated=st.booleans())
def test_the_remedy_for_batch_norm_fits(groups, parts, group, stated):
    batch = groups * group
    over = group if stated else None
    facts = Facts(1, batch_size=batch, normalize_over=over, normalizes=True)
    find = CHECKS["batch norm"]
    plan = Plan(data=1, microbatches=parts)
    problems = find(plan, facts)
    assert bool(problems) == (parts * (over or batch) != batch)
    for problem in problems:
        offered = int(re.search(r"use microbatches=(\d+)", problem.remedy)[1])
        assert find(Plan(data=1, microbatches=offered), facts) == ()


def test_an_unknown_batch_is_not_checked():
    assert check(Plan(data=4, microbatches=100), Facts(4, normalizes=True)) == ()
