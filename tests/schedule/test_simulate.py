"""Timelines: bubbles, peaks and step times equal the published closed forms."""

from __future__ import annotations

import pytest

from meshwright.errors import PlanError
from meshwright.schedule.check import check
from meshwright.schedule.named import schedule_of
from meshwright.schedule.simulate import Seconds, account, timeline, uniform
from tests.schedule.torch_orders import fused_bubble

SIZES = [(1, 1), (2, 2), (2, 8), (3, 7), (4, 8), (8, 32)]
TIMES = [(1, 1, 1), (1, 1.25, 0.75), (2, 3, 1), (3, 2, 2)]

cases = pytest.mark.parametrize("sizes", SIZES, ids=str)
times = pytest.mark.parametrize("times", TIMES, ids=str)


def of(name, sizes, times=(1, 1, 1), virtual=1):
    schedule = schedule_of(name, *sizes, virtual)
    return account(timeline(schedule, uniform(schedule.stages, *times)))


@cases
@times
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b(name, sizes, times):
    (ranks, microbatches), (forward, inputs, weights) = sizes, times
    found = of(name, sizes, times)
    assert found.bubble == (ranks - 1) * (forward + inputs + weights)
    assert found.fraction == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert found.makespan == (microbatches + ranks - 1) * (forward + inputs + weights)


@times
@pytest.mark.parametrize("virtual", [2, 3])
@pytest.mark.parametrize("name", ["gpipe", "interleaved"])
def test_a_loop_divides_the_bubble(name, times, virtual):
    for ranks, microbatches in ((2, 8), (4, 8), (8, 32)):
        found = of(name, (ranks, microbatches), times, virtual)
        work = sum(times) * microbatches * virtual
        assert found.bubble / work == pytest.approx((ranks - 1) / (microbatches * virtual))


@cases
@times
def test_zb_h1_takes_the_weights_off_the_bubble(sizes, times):
    (ranks, microbatches), (forward, inputs, weights) = sizes, times
    if microbatches < ranks:
        pytest.skip("the closed form is that of a full pipe")
    found = of("zb-h1", sizes, times)
    assert found.bubble == (ranks - 1) * (forward + inputs - weights)


@cases
def test_zb_h1_at_equal_times_is_a_third_of_1f1b(sizes):
    ranks, microbatches = sizes
    share = of("zb-h1", sizes).bubble / of("1f1b", sizes).makespan
    assert share == pytest.approx((ranks - 1) / (microbatches + ranks - 1) / 3)


@times
def test_zb_h2_takes_them_off_twice(times):
    forward, inputs, weights = times
    for ranks, microbatches in ((1, 3), (2, 8), (3, 7), (4, 8), (8, 32)):
        found = of("zb-h2", (ranks, microbatches), times)
        assert found.bubble == pytest.approx((ranks - 1) * (forward + inputs - 2 * weights))


def test_zb_v_has_no_bubble_at_equal_times():
    for sizes in ((1, 1), (2, 3), (3, 5), (4, 8), (8, 15), (8, 32)):
        assert of("zb-v", sizes).bubble == 0


@times
def test_dualpipe_v_is_within_its_closed_form(times):
    # Ours begins what waits for either half of a pair when that half is done. With pairs that give
    # out nothing before both are done, as the closed form has it, it is met at equal times.
    forward, inputs, weights = times
    for ranks, microbatches in ((2, 8), (3, 9), (4, 8), (8, 32)):
        whole = forward + inputs + weights
        form = (ranks - 1) * (whole + inputs + weights - 3 * weights)
        assert of("dualpipe-v", (ranks, microbatches), times).bubble < form
        if times == (1, 1, 1):
            assert fused_bubble(ranks, microbatches, times) == form


@pytest.mark.parametrize("sizes", [(2, 8), (3, 9), (4, 8), (8, 32)], ids=str)
@pytest.mark.parametrize("times", [(1, 1, 1), (1, 1.1, 0.9), (1, 0.9, 0.8)], ids=str)
def test_zero_bubble_is_ahead_of_1f1b(sizes, times):
    def makespan(name):
        schedule = schedule_of(name, *sizes)
        scale = schedule.stages // sizes[0]
        seconds = uniform(schedule.stages, *(time / scale for time in times), transfer=0.05)
        return account(timeline(schedule, seconds)).makespan

    line = makespan("1f1b")
    assert all(makespan(name) < 0.98 * line for name in ("zb-h1", "zb-h2", "zb-v", "dualpipe-v"))


# published/schedule_peaks.csv: schedule, ranks, chunks, micro-batches, worst rank, best rank
PEAKS = [
    ("gpipe", 4, 1, 8, 8, 8),
    ("1f1b", 4, 1, 8, 4, 1),
    ("gpipe", 4, 2, 8, 16, 16),
    ("interleaved", 4, 2, 8, 11, 5),
    ("zb-v", 4, 2, 8, 8, 8),
    ("dualpipe-v", 4, 2, 8, 9, 9),
    ("gpipe", 8, 1, 32, 32, 32),
    ("1f1b", 8, 1, 32, 8, 1),
    ("gpipe", 8, 2, 32, 64, 64),
    ("interleaved", 8, 2, 32, 23, 9),
    ("zb-v", 8, 2, 32, 16, 16),
    ("dualpipe-v", 8, 2, 32, 17, 17),
]


@pytest.mark.parametrize(("name", "ranks", "virtual", "microbatches", "most", "least"), PEAKS)
def test_published_peaks(name, ranks, virtual, microbatches, most, least):
    facts = check(schedule_of(name, ranks, microbatches, virtual))
    assert (max(facts.peaks), min(facts.peaks)) == (most, least)


@cases
def test_peaks_in_closed_form(sizes):
    ranks, microbatches = sizes
    line = check(schedule_of("1f1b", *sizes)).peaks
    assert line == tuple(min(microbatches, ranks - rank) for rank in range(ranks))
    assert check(schedule_of("gpipe", *sizes)).peaks == (microbatches,) * ranks
    # 1x: as the fullest rank of 1F1B; 2x: as two of it, less one.
    assert max(check(schedule_of("zb-h1", *sizes)).peaks) == max(line)
    assert max(check(schedule_of("zb-h2", *sizes)).peaks) == min(microbatches, 2 * ranks - 1)


def test_unequal_stages_cost_their_sum_and_the_longest_for_every_further_micro_batch():
    each = (1.0, 3.0, 2.0, 1.5)
    half = tuple(time / 2 for time in each)
    found = {}
    for name in ("gpipe", "1f1b"):
        seconds = Seconds(each, half, half, (0.0,) * 3)
        found[name] = account(timeline(schedule_of(name, 4, 9), seconds)).makespan
    assert found["gpipe"] == 2 * (sum(each) + 8 * max(each))
    # 1F1B does better: while its longest stage works, the others warm up and drain beside it.
    assert 1 + 9 * 2 * max(each) + 1 <= found["1f1b"] < found["gpipe"]


def test_transfers_are_paid_between_ranks_only():
    seconds = uniform(4, transfer=0.5)
    spans = {str(s.action): s for s in timeline(schedule_of("zb-v", 2, 1), seconds)}
    assert spans["1F0"].begin == spans["0F0"].end + 0.5
    assert spans["2F0"].begin == spans["1F0"].end
    assert spans["2I0"].begin == spans["3I0"].end + 0.5


def test_times_for_other_stages_are_refused():
    with pytest.raises(PlanError, match="3 times for forward, but 2 for 2 stages"):
        timeline(schedule_of("gpipe", 2, 2), uniform(3))
    with pytest.raises(PlanError, match="transfer of stage 0 takes nan; it must be 0 or more"):
        timeline(schedule_of("gpipe", 2, 2), uniform(2, transfer=float("nan")))


def test_the_account_adds_up():
    found = of("1f1b", (3, 4))
    assert found.busy == (12, 12, 12)
    assert found.idle == (6, 6, 6)
    assert found.makespan == 18
    assert found.spans == (18, 15, 12)
    assert found.fraction == pytest.approx(1 / 3)
