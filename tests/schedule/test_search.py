"""The search is exact where it says so, never beats its bound, and keeps to the cap."""

from __future__ import annotations

import random
from itertools import combinations, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.bound import bound, period
from meshwright.schedule.check import check
from meshwright.schedule.named import schedule_of
from meshwright.schedule.placement import folded, looped
from meshwright.schedule.problem import Memory, Problem
from meshwright.schedule.search import peaks, search
from meshwright.schedule.simulate import Seconds, account, timeline, uniform


def times(rng, stages, whole):
    forward, inputs, weights = (
        tuple(float(rng.randint(1, 5)) for _ in range(stages)) for _ in range(3)
    )
    transfer = tuple(float(rng.randint(0, 2)) for _ in range(stages - 1))
    both = tuple(i + w - rng.choice((0, 0.5)) for i, w in zip(inputs, weights, strict=True))
    return Seconds(forward, inputs, weights, transfer, both if whole else ())


def holds(problem, schedule):
    return all(
        peak <= problem.cap(rank) * (1 + 1e-9) for rank, peak in enumerate(peaks(problem, schedule))
    )


def makespan(schedule, seconds):
    return account(timeline(schedule, seconds)).makespan


# ── brute force ──────────────────────────────────────────────────────────────────────────────────


def mixes(chains):
    """All orders of some chains' items that keep each chain's."""
    if sum(map(bool, chains)) <= 1:
        yield [item for chain in chains for item in chain]
        return
    for index, chain in enumerate(chains):
        if chain:
            rest = [*chains[:index], chain[1:], *chains[index + 1 :]]
            yield from ([chain[0], *mixed] for mixed in mixes(rest))


def orders(stages, microbatches, whole):
    """Every order of one rank's actions in which F comes before I and I before W."""
    units = [(stage, index) for stage in stages for index in range(microbatches)]
    for kinds in product(("FIW", "FB") if whole else ("FIW",), repeat=len(units)):
        chains = [
            [Action(stage, kind, index) for kind in each]
            for (stage, index), each in zip(units, kinds, strict=True)
        ]
        yield from mixes(chains)


def brute(problem, whole):
    """The best makespan of all orders of all ranks, or None."""
    choices = [
        [
            tuple(order)
            for order in orders(problem.stages_of(rank), problem.microbatches, whole)
            if in_turn(order)
        ]
        for rank in range(problem.ranks)
    ]
    best = None
    for ranks in product(*choices):
        schedule = Schedule("brute", problem.placement, problem.microbatches, ranks)
        if holds(problem, schedule):
            found = evaluated(problem, ranks)
            if found is not None and (best is None or found < best):
                best = found
    return best


def in_turn(order):
    """Whether micro-batches go forward in order: they are alike, so one order stands for all."""
    firsts = [(a.stage, a.microbatch) for a in order if a.kind == "F"]
    return all(one < two for one, two in combinations(firsts, 2) if one[0] == two[0])


def evaluated(problem, ranks):
    """When the orders end, or None if they deadlock; written apart from the package's own."""
    seconds, last = problem.seconds, len(problem.placement) - 1
    ends, at, free = {}, [0] * len(ranks), [0.0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(ranks):
            while at[rank] < len(order):
                action = order[at[rank]]
                reads = _reads(action, last)
                if not all(read in ends for read in reads):
                    break
                stage = action.stage
                hops = [problem.hop(min(stage, r[0])) if stage != r[0] else 0.0 for r in reads]
                come = [ends[read] + hop for read, hop in zip(reads, hops, strict=True)]
                free[rank] = max([free[rank], *come]) + seconds.of(action)
                ends[stage, action.kind in "BI", action.microbatch] = free[rank]
                at[rank] += 1
                moved = True
    return max(free) if all(at[r] == len(order) for r, order in enumerate(ranks)) else None


def _reads(action, last):
    stage, index = action.stage, action.microbatch
    if action.kind == "F":
        return [(stage - 1, False, index)] if stage else []
    if action.kind == "W":
        return []
    return [(stage, False, index)] + ([(stage + 1, True, index)] if stage < last else [])


def against_brute_force(placement, microbatches, whole, seed):
    rng = random.Random(seed)
    stages, ranks = len(placement), 1 + max(placement)
    seconds = times(rng, stages, whole)
    held = tuple(float(rng.randint(1, 3)) for _ in range(stages))
    owed = tuple(float(rng.randint(0, 3)) for _ in range(stages)) if rng.random() < 0.5 else ()
    free = Problem(placement, microbatches, seconds, Memory((99.0,) * ranks, held, owed))
    cap = tuple(free.demand(rank) + rng.randint(0, 4) for rank in range(ranks))
    problem = Problem(placement, microbatches, seconds, Memory(cap, held, owed))
    found = search(placement, microbatches, seconds, problem.memory, effort=100_000)
    assert holds(problem, found.schedule)
    assert found.gap == 0
    assert found.makespan == makespan(found.schedule, seconds)
    assert found.makespan == pytest.approx(brute(problem, whole), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_two_ranks_two_micro_batches(seed):
    against_brute_force(looped(2), 2, False, seed)


@pytest.mark.parametrize("seed", range(4))
def test_whole_and_split_backwards_mixed(seed):
    against_brute_force(looped(2), 2, True, seed)


@pytest.mark.parametrize("seed", range(4))
def test_folded(seed):
    against_brute_force(folded(2), 1, False, seed)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(100, 160))
@pytest.mark.parametrize("whole", [False, True])
def test_two_ranks_many_times(seed, whole):
    against_brute_force(looped(2), 2, whole, seed)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(100, 140))
def test_three_ranks(seed):
    against_brute_force(looped(3), 2, False, seed)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(100, 130))
def test_looped_and_folded_many_times(seed):
    against_brute_force(looped(2, 2), 1, False, seed)
    against_brute_force(folded(2), 1, True, seed)


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(100, 104))
def test_three_micro_batches(seed):
    against_brute_force(looped(2), 3, False, seed)


def test_all_orders_of_two_stages_chains_are_tried():
    assert len(list(orders([0], 2, False))) == 20
    assert len(set(map(tuple, orders([0], 2, True)))) == 20 + 2 * 10 + 6


# ── any size ─────────────────────────────────────────────────────────────────────────────────────


@st.composite
def problems(draw):
    ranks = draw(st.integers(1, 5))
    placement = draw(
        st.sampled_from([looped(ranks), looped(ranks, 2), looped(ranks, 3), folded(ranks)])
    )
    stages = len(placement)
    rng = random.Random(draw(st.integers(0, 10**6)))
    seconds = times(rng, stages, draw(st.booleans()))
    held = tuple(rng.uniform(0.5, 2) for _ in range(stages))
    owed = draw(st.sampled_from([(), held, tuple(rng.uniform(0, 3) for _ in range(stages))]))
    count = draw(st.integers(1, 7))
    free = Problem(placement, count, seconds, Memory((99.0,) * ranks, held, owed))
    more = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    cap = tuple(free.demand(rank) + more for rank in range(ranks))
    return Problem(placement, count, seconds, Memory(cap, held, owed))


@settings(max_examples=30)
@given(problems())
def test_what_is_found_is_legal_within_the_cap_and_not_below_the_bound(problem):
    found = search(
        problem.placement, problem.microbatches, problem.seconds, problem.memory, effort=200
    )
    check(found.schedule)
    assert holds(problem, found.schedule)
    assert found.makespan == makespan(found.schedule, problem.seconds)
    assert bound(problem) <= found.bound * (1 + 1e-9)
    assert found.bound <= found.makespan
    assert period(problem) * problem.microbatches <= found.bound * (1 + 1e-9)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-h2", "zb-v"])
def test_it_is_at_least_as_good_as_any_named_schedule_that_fits(name):
    for ranks, microbatches in ((2, 5), (4, 8), (5, 12)):
        named = schedule_of(name, ranks, microbatches)
        seconds = uniform(named.stages, 1, 1.2, 0.9, transfer=0.05)
        memory = Memory(tuple(map(float, check(named).peaks)), (1.0,) * named.stages)
        found = search(named.placement, microbatches, seconds, memory, effort=0)
        assert found.makespan <= makespan(named, seconds)


def test_at_equal_times_and_the_memory_of_1f1b_it_proves_zb_h1s_step():
    found = search(looped(8), 32, uniform(8), Memory((8.0,) * 8, (1.0,) * 8))
    assert (found.makespan, found.gap) == (3 * 32 + 7, 0)


def test_less_memory_costs_time_but_never_fails():
    caps = (1, 2, 3, 5, 7)
    spent = [
        search(looped(4), 4, uniform(4), Memory((float(cap),) * 4, (1.0,) * 4)).makespan
        for cap in caps
    ]
    assert spent == sorted(spent, reverse=True)
    assert (spent[0], spent[-1]) == (4 * 9, 15)


def test_a_cap_that_cannot_be_met_names_the_least_that_can():
    memory = Memory((9.0, 4.5), (2.0, 3.0, 2.0, 1.0))
    with pytest.raises(PlanError, match=r"rank 1 may hold 4.5 .* takes 5; the least cap .* is 5"):
        search(folded(2), 4, uniform(4), Memory((9.0, 4.5), (2.0, 3.0, 2.0, 1.0)))
    enough = Memory((9.0, 5.0), memory.held)
    check(search(folded(2), 4, uniform(4), enough, effort=0).schedule)


def test_numbers_that_do_not_go_together_are_refused():
    with pytest.raises(PlanError, match="memory is given for 2 ranks and 3 stages, but there are"):
        search(looped(2), 4, uniform(2), Memory((9.0, 9.0), (1.0,) * 3))
    with pytest.raises(PlanError, match="every rank from 0 on must hold a stage"):
        search((0, 2), 4, uniform(2))
    with pytest.raises(PlanError, match="3 times for forward, but 2 for 2 stages"):
        search(looped(2), 4, uniform(3))


def test_a_cheaper_whole_backward_is_used_where_nothing_waits():
    seconds = Seconds((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (0.0,), (1.5,) * 2)
    both = Seconds(*(seconds.forward,) * 3, (0.0,))
    found = search(looped(2), 4, seconds)
    kinds = [{action.kind for action in order} for order in found.schedule.ranks]
    assert "B" in kinds[0]  # nothing comes before stage 0
    assert found.gap == 0
    assert found.makespan < search(looped(2), 4, both).makespan
    assert found.makespan < makespan(schedule_of("1f1b", 2, 4), seconds)


def test_the_same_question_has_the_same_answer():
    rng = random.Random(3)
    seconds = times(rng, 6, True)
    memory = Memory((5.0,) * 3, (1.0,) * 6)
    one, two = (search(folded(3), 5, seconds, memory, effort=500) for _ in range(2))
    assert one == two


def test_brute_force_tries_no_order_twice():
    chains = [["a", "b"], ["c"], ["d"]]
    found = list(map(tuple, mixes(chains)))
    wanted = {p for p in permutations("abcd") if p.index("a") < p.index("b")}
    assert set(found) == wanted
    assert len(found) == len(wanted)
