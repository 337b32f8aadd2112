"""Asynchronous pipelines: orders, weights met, versions held, no idle slot; errors told."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from typing_extensions import override

from meshwright.errors import PlanError
from meshwright.schedule.action import Action
from meshwright.schedule.check import check as check_schedule
from meshwright.schedule.draw import columns
from meshwright.schedule.pipedream import Asynchronous, Seat, Update, asynchronous_of
from meshwright.schedule.unroll import as_schedule, check, idle, spans, unrolled

NAMES = ("pipedream", "pipedream-vertical", "pipedream-2bw")


def pipe(name: str, stages: int, microbatches: int | None = None) -> Asynchronous:
    """One that is legal, of unreplicated stages."""
    least = max(1, stages - 1) if name == "pipedream-2bw" else 1
    return asynchronous_of(name, (1,) * stages, microbatches or least)


def test_the_picture_is_that_of_the_paper():
    drawn = columns(spans(pipe("pipedream", 3), 4, (1.0,) * 3, (1.0,) * 3))
    assert drawn == (
        "rank 0  0F0 0F1 0F2   .   . 0B0 0F3 0B1   . 0B2   . 0B3\n"
        "rank 1    . 1F0 1F1   . 1B0 1F2 1B1 1F3 1B2   . 1B3\n"
        "rank 2    .   . 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3\n"
    )


@pytest.mark.parametrize("stages", range(1, 9))
def test_weights_met_are_those_of_the_papers(stages: int):
    stashing, vertical, double = (pipe(name, stages) for name in NAMES)
    for base, t in itertools.product((0, 5), range(30)):
        if t < base:
            continue
        for stage in range(stages):
            assert stashing.seen(stage, t, base) == max(base, t - (stages - 1 - stage))
            assert vertical.seen(stage, t, base) == max(base, t - (stages - 1))
            assert double.seen(stage, t, base) == max(base, t - 1)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_is_what_a_run_of_the_orders_holds(name: str, stages: int):
    made = pipe(name, stages)
    facts = check(made, 3 * stages + 4, base=2)
    every = range(stages)
    assert facts.in_flight == tuple(stages - stage for stage in every)
    assert facts.in_flight == tuple(made.in_flight(stage) for stage in every)
    wanted = {
        "pipedream": tuple(stages - stage for stage in every),
        "pipedream-vertical": (stages,) * stages,
        "pipedream-2bw": (2,) * stages,
    }
    assert facts.versions == wanted[name] == tuple(made.versions(stage) for stage in every)


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("times", [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)])
def test_no_slot_is_idle_once_the_pipe_is_full(name: str, stages: int, times: tuple[float, float]):
    made = pipe(name, stages)
    steps = 8 * stages
    found = spans(made, steps, (times[0],) * stages, (times[1],) * stages)
    whole = sum(times) * steps * made.microbatches
    waits = idle(found, sum(times) * 2 * stages, whole - sum(times) * stages)
    assert max(waits) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("replicas", [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4, 1)])
def test_replicated_input_stages_that_are_as_fast_leave_no_slot_idle(replicas: tuple[int, ...]):
    made = asynchronous_of("pipedream", replicas)
    steps = math.lcm(*replicas) * (made.ahead(0) + 12)
    found = spans(made, steps, [1.0 * r for r in replicas], [2.0 * r for r in replicas])
    end = 3.0 * (steps - made.ahead(0) - math.lcm(*replicas))
    assert max(idle(found, end / 2, end)) == pytest.approx(0.0, abs=1e-9)


def replications(stages: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, 2, 3), repeat=stages))


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES[:2])
def test_replicas_meet_the_weights_that_the_arithmetic_says(name: str, stages: int):
    for replicas in replications(stages):
        made = asynchronous_of(name, replicas)
        steps = 4 * math.lcm(*replicas) + made.ahead(0)
        facts = check(made, steps, base=4)
        every = range(stages)
        assert facts.in_flight == tuple(made.in_flight(stage) for stage in every)
        assert all(facts.versions[s] <= made.versions(s) for s in every)
        assert made.in_flight(0) == -(-sum(replicas) // replicas[0])  # the paper's NOAM
        if name == "pipedream":
            assert facts.versions == facts.in_flight


def test_a_replica_takes_every_other_minibatch_and_both_update_together():
    made = asynchronous_of("pipedream", (2, 1))
    orders = unrolled(made, 4)
    text = {seat: " ".join(map(str, order)) for seat, order in orders.items()}
    assert text[Seat(0, 0)].startswith("0F0 0F2 0B0 Update(stage=0, minibatch=1) 0B2")
    assert text[Seat(0, 1)].startswith("0F1 0F3 0B1 Update(stage=0, minibatch=1) 0B3")
    assert [made.seen(0, t) for t in range(8)] == [0, 0, 0, 0, 2, 2, 4, 4]
    assert [made.seen(1, t) for t in range(8)] == list(range(8))
    assert made.staleness(0) == (2, 3)
    assert made.staleness(1) == (0, 0)
    assert made.owed(0, 3) == 1


def test_every_minibatch_is_taken_once_at_each_stage_and_its_check_says_so():
    made = pipe("pipedream", 3)
    orders = dict(unrolled(made, 6))
    middle = Seat(1)
    orders[middle] = [item for item in orders[middle] if item != Action(1, "B", 5)]
    with pytest.raises(PlanError, match=r"waits at 0B5 for 1B5"):
        check(made, 6, orders=orders)
    orders[middle] = [*unrolled(made, 6)[middle], Action(1, "F", 0)]
    with pytest.raises(PlanError, match="1F0 comes twice"):
        check(made, 6, orders=orders)


def test_an_order_that_meets_other_weights_is_refused():
    made = pipe("pipedream", 2)
    orders = dict(unrolled(made, 6))
    orders[Seat(0)] = [  # each update before the forward that should come first
        *(Action(0, "F", 0), Action(0, "B", 0), Update(0, 0)),
        *(item for t in range(1, 6) for item in
          (Action(0, "F", t), Action(0, "B", t), Update(0, t))),
    ]  # fmt: skip
    with pytest.raises(PlanError, match=r"0F1 should meet the weights after 0 minibatches"):
        check(made, 6, orders=orders)


def test_weights_that_are_never_kept_are_missed():
    @dataclass(frozen=True, slots=True)
    class Hasty(Asynchronous):
        @override
        def seen(self, stage: int, minibatch: int, base: int = 0) -> int:
            return minibatch

    with pytest.raises(PlanError, match="0F1 should meet the weights after 1 minibatches"):
        check(Hasty("pipedream", (1, 1)), 4)


def test_as_a_schedule_it_passes_the_check_of_all_schedules():
    for stages, name in itertools.product(range(1, 6), NAMES):
        made = pipe(name, stages)
        facts = check_schedule(as_schedule(made, 5))
        assert facts.peaks == tuple(min(stages - s, 5 * made.microbatches) for s in range(stages))


def test_a_drain_discards_what_is_in_flight():
    made = pipe("pipedream", 3)
    assert made.begun(Seat(0), 7) == (7, 8)
    assert made.begun(Seat(0), 7, until=8) == (7,)
    assert made.begun(Seat(2), 7) == ()


@pytest.mark.parametrize(
    ("name", "replicas", "how", "told"),
    [
        ("pipedream", (1, 1), {"microbatches": 2}, "drop|leave microbatches out"),
        ("pipedream-2bw", (2, 1), {"microbatches": 4}, "split their samples by data=2"),
        ("pipedream-2bw", (1, 1, 1, 1), {"microbatches": 2}, "use microbatches=3"),
        ("pipedream", (1, 1), {"virtual": 2}, "take schedule=interleaved"),
    ],
)
def test_what_the_papers_do_not_define_is_refused(name, replicas, how, told):
    with pytest.raises(PlanError, match=told):
        asynchronous_of(name, replicas, **how)
