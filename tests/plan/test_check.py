"""Whether a plan fits: each check's wording, and that remedies work."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.check import CHECKS, RUNS, Facts, check, require
from meshwright.plan.named import ASYNCHRONOUS, SCHEDULES
from meshwright.plan.plan import KEYS, Plan
from meshwright.plan.remat import budget_of

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
                "precision=bf16 or precision=fp16 or precision=bf16-pure only; write precision=bf16"
            ),
        ),
        (
            Plan(data=1, precision="half"),
            Facts(1),
            (
                "plan asks for precision=half, but this version runs precision=float32 or "
                "precision=bf16 or precision=fp16 or precision=bf16-pure only; write precision=fp16"
            ),
        ),
        (
            Plan(data=1, precision="bf16-pure", offload="host"),
            Facts(1),
            (
                "plan asks for precision=bf16-pure with offload=host, but what is offloaded is "
                "stepped where it lies, which does not round it; use precision=bf16, or drop "
                "offload"
            ),
        ),
        (
            Plan(data=1, precision="fp8"),
            Facts(1),
            (
                "plan asks for precision=fp8, but this version runs precision=float32 or "
                "precision=bf16 or precision=fp16 or precision=bf16-pure only; drop precision"
            ),
        ),
        (
            Plan(data=1, gather="step"),
            Facts(1),
            (
                "plan asks for gather=step without ZeRO, but no weights are gathered then; "
                "use zero3, zero2 or zero1, or drop gather"
            ),
        ),
        (
            Plan(data=2, zero=2, gather="microbatch"),
            Facts(2),
            (
                "plan asks for gather=microbatch with zero=2, but its weights lie whole on every "
                "rank between steps; use zero3, or drop gather"
            ),
        ),
        (
            Plan(data=1, cuts=("a", "b")),
            Facts(1),
            (
                "plan asks for cuts ['a', 'b'], but pipeline=1 is one stage, with nothing to cut "
                "or order; use pipeline=3, or drop cuts"
            ),
        ),
        (
            Plan(data=1, schedule="1f1b"),
            Facts(1),
            (
                "plan asks for schedule=1f1b, but pipeline=1 is one stage, with nothing to cut or "
                "order; use pipeline=2, or drop schedule"
            ),
        ),
        (
            Plan(data=1, virtual=2),
            Facts(1),
            (
                "plan asks for virtual=2, but pipeline=1 is one stage, with nothing to cut or "
                "order; use pipeline=2, or drop virtual"
            ),
        ),
        (
            Plan(replicas="2-1-1"),
            Facts(4),
            (
                "plan asks for replicas=2-1-1, but pipeline=1 is one stage, with nothing to cut "
                "or order; use pipeline=3, or drop replicas"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="1f1p"),
            Facts(2),
            "plan asks for schedule=1f1p; did you mean '1f1b'?",
        ),
        (
            Plan(data=1, pipeline=2, schedule="1f1b", virtual=2),
            Facts(2),
            (
                "plan asks for schedule=1f1b with virtual=2, but it holds one stage on each rank; "
                "drop virtual, or use schedule=interleaved"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="interleaved"),
            Facts(2),
            (
                "plan asks for schedule=interleaved with virtual=1, but it is about several "
                "stages on each rank; use virtual=2 or more, or schedule=1f1b"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="zb-v", virtual=3),
            Facts(2),
            (
                "plan asks for schedule=zb-v with virtual=3, but it holds exactly two stages on "
                "each rank; drop virtual, or use schedule=interleaved"
            ),
        ),
        (
            Plan(data=1, pipeline=3, cuts=("a",)),
            Facts(3),
            (
                "plan has 1 cut, which makes 2 stages, but pipeline=3 has 3; name the first "
                "module of every stage but the first, 2 in all, or drop cuts to have them chosen"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="dualpipe-v", cuts=("a", "b")),
            Facts(2),
            (
                "plan has 2 cuts, which make 3 stages, but pipeline=2 with 2 stages a rank has 4; "
                "name the first module of every stage but the first, 3 in all, or drop cuts to "
                "have them chosen"
            ),
        ),
        (
            Plan(data=3, pipeline=2, replicas="2-1", schedule="pipedream"),
            Facts(3),
            (
                "plan asks for replicas=2-1 and data=3, but both say how many data ranks a stage "
                "has; drop data"
            ),
        ),
        (
            Plan(pipeline=3, replicas="2-1", schedule="pipedream"),
            Facts(3),
            (
                "plan asks for replicas=2-1, which is 2 stages, but pipeline=3; use pipeline=2, or "
                "give 3 numbers"
            ),
        ),
        (
            Plan(pipeline=2, replicas="2-1", tensor=2, schedule="pipedream"),
            Facts(4),
            ("plan asks for replicas=2-1 x tensor=2 = 6 ranks, but the world has 4; start 6 ranks"),
        ),
        (
            Plan(pipeline=2, replicas="2-1", schedule="zb-h1"),
            Facts(3),
            (
                "plan asks for replicas=2-1, but schedule=zb-h1 has the same ranks at every stage; "
                "use schedule=1f1b, or data=2 in place of replicas"
            ),
        ),
        (
            Plan(pipeline=2, replicas="2-2", schedule="gpipe", zero=1),
            Facts(4),
            (
                "plan asks for replicas=2-2 with zero=1, but replicas of a stage take turns and "
                "share nothing; drop zero, or use data in place of replicas, which ZeRO shards over"
            ),
        ),
        (
            Plan(pipeline=3, actions=("0F0,0B0", "1F0,1B0"), schedule="gpipe"),
            Facts(3),
            ("plan has actions and schedule=gpipe, but its actions say that; drop schedule"),
        ),
        (
            Plan(pipeline=3, actions=("0F0,0B0", "1F0,1B0")),
            Facts(3),
            (
                "plan has actions of 2 lines, but pipeline=3; write one line for each pipeline "
                "rank, or use pipeline=2"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="pipedream"),
            Facts(2, clip_norm=1.0),
            (
                "schedule=pipedream has no moment at which all stages' gradients of a minibatch "
                "are there, which clip_norm=1.0 takes the norm of; leave clip_norm out of the "
                "job, or use a schedule that flushes, such as 1f1b"
            ),
        ),
        (
            Plan(data=2, microbatches=3),
            Facts(2, slices=4),
            (
                "adascale needs scale=4 slices of the batch, but data=2 and microbatches=3 make "
                "6; use microbatches=2 and data=2"
            ),
        ),
        (
            Plan(data=3),
            Facts(3, slices=4),
            (
                "adascale needs scale=4 slices of the batch, but data=3 and microbatches=1 make "
                "3; use microbatches=4 and data=3"
            ),
        ),
        (
            Plan(pipeline=2, replicas="2-2", microbatches=2),
            Facts(4, slices=4),
            (
                "adascale needs scale=4 slices of the batch, but data=1 and microbatches=2 make "
                "2; use microbatches=4"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="pipedream"),
            Facts(2, slices=4),
            (
                "schedule=pipedream has no moment at which all gradients of a minibatch are "
                "there, whose variance adascale's scale=4 slices are for; leave adascale out of "
                "the job, or use a schedule that flushes, such as 1f1b"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="pipedream-vertical", zero=1),
            Facts(2),
            (
                "schedule=pipedream-vertical computes with several versions of the weights at "
                "once, but zero=1 keeps shards of one; drop zero, or use a schedule that flushes, "
                "such as 1f1b"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="pipedream", microbatches=4),
            Facts(2),
            (
                "schedule=pipedream updates the weights after every minibatch of batch_size "
                "samples and does not divide it, but microbatches=4; drop microbatches, or use "
                "schedule=pipedream-2bw, which adds their gradients up"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="pipedream", precisions=(("head", "fp16"),)),
            Facts(2),
            (
                "schedule=pipedream has begun the next steps by the time that gradients of fp16 "
                "are found to overflow, and their step has to be left out; use precision=bf16, "
                "which needs no loss scaling, or use a schedule that flushes, such as 1f1b"
            ),
        ),
        (
            Plan(data=1, pipeline=2, schedule="pipedream", precision="bf16-pure"),
            Facts(2),
            (
                "schedule=pipedream keeps older versions of the weights, which "
                "precision=bf16-pure does not round by itself; use precision=bf16, or use a "
                "schedule that flushes, such as 1f1b"
            ),
        ),
        (
            Plan(data=1, pipeline=3, schedule="pipedream-2bw", microbatches=2),
            Facts(3),
            (
                "schedule=pipedream-2bw keeps two versions of the weights, which suffice only if "
                "a minibatch has a micro-batch for each stage, but microbatches=2 and pipeline=3; "
                "use microbatches=3 or more, or schedule=pipedream"
            ),
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


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("pipeline", [2, 4])
def test_every_schedule_runs_at_any_number_of_ranks(schedule, pipeline):
    virtual = 2 if schedule == "interleaved" else 1
    parts = 1 if schedule in ("pipedream", "pipedream-vertical") else 4
    plan = Plan(data=1, pipeline=pipeline, schedule=schedule, virtual=virtual, microbatches=parts)
    assert check(plan, Facts(pipeline, batch_size=8)) == ()
    assert plan.asynchronous == (schedule in ASYNCHRONOUS)


@pytest.mark.parametrize(("data", "parts"), [(4, 1), (2, 2), (1, 4), (2, 4), (3, 4)])
def test_slices_are_parts_of_micro_batches_or_these(data, parts):
    assert check(Plan(data=data, microbatches=parts), Facts(data, slices=4)) == ()


def test_cuts_and_replicas_that_fit():
    assert check(Plan(data=1, pipeline=3, cuts=("a", "b")), Facts(3)) == ()
    assert check(Plan(data=1, pipeline=2, virtual=2, cuts=("a", "b", "c")), Facts(2)) == ()
    turns = Plan(pipeline=2, replicas="15-1", schedule="pipedream")
    assert check(turns, Facts(16, batch_size=1)) == ()


def test_all_problems_are_named_at_once():
    with pytest.raises(PlanError) as caught:
        require(Plan(data=3, offload="cpu", remat="half", microbatches=9), Facts(4, batch_size=8))
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
    other = 2 if isinstance(RUNS[key][0], int) else "other"
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


@pytest.mark.parametrize(
    ("remat", "words"),
    [
        ("half", "known: full, marks, none, selective"),
        ("selectiv", "did you mean 'selective'?"),
        ("budget", "write remat=budget:SIZE"),
        ("budget:", "remat=budget: takes bytes"),
        ("budget:much", "remat=budget: takes bytes, as in 512KiB, 2MiB or 1.5GiB, not 'much'"),
        ("budget:0", "give it the bytes that a rank may hold"),
    ],
)
def test_remat_is_a_policy_or_a_budget(remat, words):
    (problem,) = check(Plan(data=1, remat=remat), Facts(1))
    assert words in str(problem)


@pytest.mark.parametrize("remat", ["none", "full", "selective", "marks", "budget:2GiB", "budget:9"])
def test_remat_that_there_is(remat):
    assert check(Plan.parse(f"data=1,remat={remat}"), Facts(1)) == ()
    assert Plan.parse(Plan(data=1, remat=remat).text()) == Plan(data=1, remat=remat)
    assert budget_of(Plan(remat=remat)) == {"budget:2GiB": 2**31, "budget:9": 9}.get(remat)
