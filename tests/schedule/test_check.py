"""`check`: every schedule we make is legal; one that is not is refused, and the error says why."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.check import check, least_ahead
from meshwright.schedule.named import SCHEDULES, schedule_of
from meshwright.schedule.text import from_text

NAMES = [name for name in SCHEDULES if name != "search"]
VIRTUAL = {"interleaved": (2, 3), "gpipe": (1, 2), "fill-drain": (1, 2)}


def bound(name, ranks, microbatches, virtual):
    """Most forwards alive on any rank, in the papers' closed forms."""
    whole = microbatches * virtual
    return {
        "gpipe": whole,
        "1f1b": min(microbatches, ranks),
        "interleaved": min(whole, 2 * (ranks - 1) + (virtual - 1) * group(ranks, microbatches) + 1),
        "zb-h1": min(microbatches, ranks),
        "zb-h2": min(microbatches, 2 * ranks - 1),
        "zb-v": min(2 * microbatches, 2 * ranks),
        "dualpipe-v": min(2 * microbatches, 2 * ranks + 1),
        "fill-drain": whole,
    }[name]


def group(ranks, microbatches):
    """The size of interleaved's first, largest group: P where P divides m."""
    return -(-microbatches // max(1, microbatches // ranks))


def legal(name, ranks, microbatches):
    for virtual in VIRTUAL.get(name, (1,)):
        schedule = schedule_of(name, ranks, microbatches, virtual)
        facts = check(schedule)
        stages = range(schedule.stages)
        held = [[s for s in stages if schedule.placement[s] == rank] for rank in range(ranks)]
        assert all(len(each) == len(held[0]) for each in held)
        assert max(facts.peaks) <= bound(name, ranks, microbatches, virtual)
        assert all(to <= peak for to, peak in zip(facts.peaks_to_input, facts.peaks, strict=True))


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("name", NAMES)
def test_all_numbers_to_eight_ranks_and_thirty_two_micro_batches(name, ranks):
    for microbatches in range(1, 33):
        legal(name, ranks, microbatches)


@given(st.sampled_from(NAMES), st.integers(1, 24), st.integers(1, 70))
def test_beyond(name, ranks, microbatches):
    legal(name, ranks, microbatches)


@pytest.mark.parametrize("name", NAMES)
def test_one_posted_receive_will_do_in_a_line_and_two_in_a_v(name):
    for ranks, microbatches in ((2, 3), (4, 8), (5, 7), (8, 16)):
        virtual = 2 if name == "interleaved" else 1
        schedule = schedule_of(name, ranks, microbatches, virtual)
        least = least_ahead(schedule)
        assert least <= (2 if name in ("zb-v", "dualpipe-v") else 1)
        assert check(schedule, ahead=least) == check(schedule)


def test_loops_take_more_posted_receives_the_more_micro_batches_a_chunk_has():
    assert [least_ahead(schedule_of("gpipe", 2, count, 2)) for count in (4, 8, 16)] == [2, 4, 8]
    with pytest.raises(PlanError, match="rank 0 waits at 0F5 for rank 1 to take it for 1F5; rank"):
        check(schedule_of("gpipe", 2, 8, 2), ahead=2)


def test_too_few_posted_receives_are_named():
    # Rank 1 reads the second message of rank 0 before the first.
    schedule = from_text("0F0,0F1,0B1,0B0\n1F1,1B1,1F0,1B0\n")
    assert least_ahead(schedule) == 2
    with pytest.raises(PlanError, match="rank 0 waits at 0F1 for rank 1 to take it for 1F1; rank"):
        check(schedule, ahead=1)


# ── what must not pass ───────────────────────────────────────────────────────────────────────────


@st.composite
def places(draw):
    name = draw(st.sampled_from(NAMES))
    schedule = schedule_of(
        name, draw(st.integers(2, 5)), draw(st.integers(2, 9)), 2 if name == "interleaved" else 1
    )
    rank = draw(st.integers(0, len(schedule.ranks) - 1))
    return schedule, rank, draw(st.integers(0, len(schedule.ranks[rank]) - 1))


def with_rank(schedule, rank, order):
    ranks = tuple(order if each == rank else old for each, old in enumerate(schedule.ranks))
    return replace(schedule, ranks=ranks)


@given(places())
def test_a_dropped_action_is_missed(place):
    schedule, rank, index = place
    order = schedule.ranks[rank]
    with pytest.raises(PlanError, match=f"rank {rank} lacks {order[index]}$"):
        check(with_rank(schedule, rank, order[:index] + order[index + 1 :]))


@given(places())
def test_a_doubled_action_is_found(place):
    schedule, rank, index = place
    order = schedule.ranks[rank]
    with pytest.raises(PlanError, match=f"{order[index]} comes 2 times, not once"):
        check(with_rank(schedule, rank, (*order, order[index])))


@given(places(), st.data())
def test_an_action_on_another_rank_is_found(place, data):
    schedule, rank, index = place
    other = data.draw(st.integers(0, len(schedule.ranks) - 1).filter(lambda found: found != rank))
    action = schedule.ranks[rank][index]
    order = schedule.ranks[rank]
    moved = with_rank(schedule, rank, order[:index] + order[index + 1 :])
    moved = with_rank(moved, other, (*moved.ranks[other], action))
    with pytest.raises(PlanError, match=f"rank {other} has {action}, but stage {action.stage} is"):
        check(moved)


@given(places())
def test_an_action_before_what_it_reads_on_its_rank_deadlocks(place):
    schedule, rank, _ = place
    order = schedule.ranks[rank]
    for first, second in pairwise(range(len(order))):
        one, two = order[first], order[second]
        if (one.stage, one.microbatch) == (two.stage, two.microbatch):
            turned = (*order[:first], two, one, *order[second + 1 :])
            with pytest.raises(PlanError, match=f"at {two} for {one}, which comes later on the"):
                check(with_rank(schedule, rank, turned))


@given(places(), st.data())
def test_two_swapped_actions_pass_only_if_the_order_still_runs(place, data):
    schedule, rank, index = place
    order = list(schedule.ranks[rank])
    other = data.draw(st.integers(0, len(order) - 1))
    order[index], order[other] = order[other], order[index]
    swapped = with_rank(schedule, rank, tuple(order))
    if runs(swapped):
        check(swapped)
    else:
        with pytest.raises(PlanError, match="deadlocks: rank"):
            check(swapped)


def runs(schedule):
    """The dependencies once more, the slow way: rounds over all ranks until nothing moves."""
    done, at = set(), [0] * len(schedule.ranks)
    last = schedule.stages - 1

    def reads(action):
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "F":
            return [(stage - 1, "F", microbatch)] if stage else []
        if action.kind == "W":
            return [(stage, "B", microbatch)]
        later = [(stage + 1, "B", microbatch)] if stage < last else []
        return [(stage, "F", microbatch), *later]

    before = -1
    while before != len(done):
        before = len(done)
        for rank, order in enumerate(schedule.ranks):
            while at[rank] < len(order) and all(r in done for r in reads(order[at[rank]])):
                action = order[at[rank]]
                kind = "B" if action.kind == "I" else action.kind
                done.add((action.stage, kind, action.microbatch))
                at[rank] += 1
    return len(done) == sum(map(len, schedule.ranks))


def test_a_deadlock_names_its_ring():
    text = "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"
    message = "rank 0 waits at 0B0 for 1B0; rank 1 waits at 1F1 for 0F1"
    with pytest.raises(PlanError, match=f"schedule mine deadlocks: {message}$"):
        check(from_text(text, "mine"))


def test_a_ring_leaves_out_the_ranks_that_only_wait_for_it():
    text = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n2F0,2F1,2B0,2B1\n3F1,3B1,3F0,3B0\n"
    message = "deadlocks: rank 1 waits at 1B0 for 2B0; rank 2 waits at 2F1 for 1F1$"
    with pytest.raises(PlanError, match=message):
        check(from_text(text))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("0F0,0B0,0W0", "0B0 is the whole backward, and 0W0 is there too; take B, or I and W"),
        ("0F0,0I0", "rank 0 lacks 0W0"),
        ("0F0,0W0", "rank 0 lacks 0I0"),
        ("0F0,0F1,0B0", "rank 0 lacks 0B1"),
        ("0F0,0W0,0I0", "rank 0 waits at 0W0 for 0I0, which comes later on the same rank"),
    ],
)
def test_backwards_that_do_not_add_up(ranks, message):
    with pytest.raises(PlanError, match=message):
        check(from_text(ranks))


def test_numbers_outside_are_refused():
    actions = (Action(0, "F", 0), Action(1, "F", 0))
    with pytest.raises(PlanError, match="rank 0 has 1F0, but there are 1 stages"):
        check(Schedule("mine", (0,), 1, (actions,)))
    with pytest.raises(PlanError, match="rank 0 has 0F3, but there are 1 micro-batches"):
        check(Schedule("mine", (0,), 1, ((Action(0, "F", 3),),)))
    with pytest.raises(PlanError, match="stage 0 is on rank 4, but there are 1 ranks"):
        check(Schedule("mine", (4,), 1, ((Action(0, "F", 0),),)))


def test_what_is_alive():
    facts = check(from_text("0F0,0F1,0I0,0I1,0F2,0W0,0I2,0W1,0W2"))
    assert facts.peaks == (3,)
    assert facts.peaks_to_input == (2,)
    assert facts.peaks_owed == (2,)
