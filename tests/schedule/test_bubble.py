"""What a user is told of bubbles, and that it is true."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan import named
from meshwright.plan.plan import Plan
from meshwright.schedule.bubble import bubble, pipeline_notes
from meshwright.schedule.named import SCHEDULES


@given(ranks=st.integers(2, 6), parts=st.integers(1, 20))
def test_the_bubble_of_flushing_schedules_is_the_closed_form(ranks, parts):
    for schedule in ("gpipe", "1f1b"):
        plan = Plan(pipeline=ranks, schedule=schedule, microbatches=parts)
        assert bubble(plan) == pytest.approx((ranks - 1) / (parts + ranks - 1))


def test_schedules_that_a_plan_names_are_there():
    made_here = set(SCHEDULES) - {"fill-drain"}
    assert made_here <= set(named.SCHEDULES)
    assert {*named.CHUNKED, *named.PAIRED, *named.ASYNCHRONOUS} <= set(named.SCHEDULES)


def test_few_micro_batches_are_told_of():
    (note,) = pipeline_notes(Plan(pipeline=4, microbatches=2), 64)
    assert note == (
        "2 micro-batches a step cannot keep pipeline=4 busy under schedule=1f1b: ranks stand idle "
        "60% of the time; with microbatches=16 it is 16%"
    )
    (note,) = pipeline_notes(Plan(data=2, pipeline=4), 2)
    assert note.startswith("1 micro-batch a step")
    assert note.endswith("75% of the time; a larger batch_size allows more of them")


def test_enough_micro_batches_are_not_told_of():
    assert pipeline_notes(Plan(pipeline=4, microbatches=4), 64) == ()
    assert pipeline_notes(Plan(data=4), 64) == ()


@pytest.mark.parametrize(
    ("text", "ages"),
    [
        ("pipeline=3,schedule=pipedream", "by stage 2, 1, 0 of them"),
        ("pipeline=3,schedule=pipedream-vertical", "by stage 2, 2, 2 of them"),
        ("pipeline=2,schedule=pipedream-2bw,microbatches=2", "by stage 1, 1 of them"),
    ],
)
def test_how_old_the_weights_of_gradients_are_is_told(text, ages):
    (note,) = pipeline_notes(Plan.parse(text), 64)
    assert note.startswith(f"schedule={Plan.parse(text).schedule} never flushes")
    assert ages in note


@given(
    schedule=st.sampled_from(["gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"]),
    ranks=st.integers(2, 4),
    parts=st.integers(1, 6),
    batch=st.integers(8, 64),
)
def test_what_is_advised_is_better_and_fits_the_batch(schedule, ranks, parts, batch):
    plan = Plan(pipeline=ranks, schedule=schedule, microbatches=parts)
    for note in pipeline_notes(plan, batch):
        if advised := re.search(r"with microbatches=(\d+)", note):
            assert parts < int(advised[1]) <= batch
            assert bubble(replace(plan, microbatches=int(advised[1]))) < bubble(plan)
