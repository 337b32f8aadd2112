"""Counts that speed rests on: segments lowered, instructions, collectives, allocations per step."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from meshwright.comm.local import LocalWorld
from meshwright.program.bucket import BUCKET_BYTES
from tests.equal.cells import example
from tests.equal.harness import Case

PLANS = ["data=2", "zero1,data=2", "zero2,data=2", "zero3,data=2"]


@cache
def gpt(depth, width=64):
    job = example("gpt").job(depth=depth, width=width, context=16, batch=8, dropout=0.1)
    return Case(job)


def ready(case, plan):
    """Workers of a plan in one world, and their first batches."""
    build = case.build(plan, None)
    workers = case.workers(build)
    world = LocalWorld(len(workers))
    fetched = world.perform([w.agree_on_shapes(w.fetch(0)) for w in workers])
    return world, workers, fetched


@cache
def compiled(depth, plan, width=64):
    _, workers, fetched = ready(gpt(depth, width), plan)
    return workers[0].lowered(fetched[0]).compiled


def kinds(depth, plan):
    return Counter(i.kind for i in compiled(depth, plan).instructions.body)


@pytest.mark.parametrize("plan", [*PLANS, "data=1", "zero3,data=2,microbatches=3"])
def test_a_deeper_model_lowers_no_more_segments(plan):
    shallow, deep = (len(compiled(depth, plan).instructions.segments) for depth in (3, 8))
    assert deep == shallow


@pytest.mark.parametrize("plan", [*PLANS, "data=1"])
def test_a_layer_runs_as_a_few_instructions(plan):
    """Forward and backward of each block, and what frees their values."""
    runs = [kinds(depth, plan)["Run"] for depth in (3, 5, 8)]
    each = (runs[2] - runs[0]) / 5
    assert each == (runs[1] - runs[0]) / 2, "so many per layer, whatever the depth"
    assert each <= 3


@pytest.mark.parametrize(
    ("plan", "starts"),
    [("data=1", 0), ("data=2", 2), ("zero1,data=2", 4), ("zero2,data=2", 4), ("zero3,data=2", 5)],
)
def test_collectives_of_a_small_model_do_not_grow_with_its_depth(plan, starts):
    """The loss's count, sums whole and sharded, gathers after the update, or twice before use."""
    for depth in (3, 8):
        found = kinds(depth, plan)
        assert found["Start"] == found["Wait"] == starts


def test_buckets_of_a_large_model_are_full():
    """A bucket holds as much as fits; two in a row would not."""
    made = compiled(4, "data=2", 704)
    loads = [
        sum(unit.program.values[op.inputs[0]].bytes for op in bucket)
        for bucket in made.instructions.calls
        for _, unit in made.units
        if bucket[0].phase == "finish"
    ]
    assert len(loads) > 2
    assert all(load <= BUCKET_BYTES for load in loads)
    assert all(a + b > BUCKET_BYTES for a, b in itertools.pairwise(loads))


def allocations(body):
    """(number of allocations, bytes kept) of what a function does on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        body()
    events = seen.profiler.kineto_results.events()  # the raw ones: tables leave some out
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(size > 0 for size in sizes), sum(sizes)


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=2", "data=2,microbatches=2"])
def test_steps_allocate_alike_and_keep_nothing(plan):
    world, workers, fetched = ready(gpt(2), plan)

    def step():
        world.perform([w.step(f, None) for w, f in zip(workers, fetched, strict=True)])

    for _ in range(3):
        step()
    (number, kept), (again, more) = allocations(step), allocations(step)
    assert number == again > 0
    # The last step's few sums go with its work, when Python gets to that.
    assert abs(kept) + abs(more) <= 200 * len(workers)


def test_the_count_of_allocations_counts():
    kept = []
    assert allocations(lambda: kept.append(torch.empty(1000))) == (1, 4000)
