"""Schedules by name: which there are, what they may be given, what the error says."""

from __future__ import annotations

import pytest

from meshwright.errors import PlanError
from meshwright.schedule.check import check
from meshwright.schedule.named import SCHEDULES, schedule_of
from meshwright.schedule.placement import folded, looped
from meshwright.schedule.simulate import account, timeline, uniform


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_name_makes_a_legal_schedule_called_so(name, ranks, microbatches):
    schedule = schedule_of(name, ranks, microbatches, 2 if name == "interleaved" else 1)
    check(schedule)
    assert (schedule.name, len(schedule.ranks)) == (name, ranks)
    assert schedule.microbatches == microbatches
    assert schedule.placement in (looped(ranks), looped(ranks, 2), folded(ranks))
    if name != "dualpipe-v":  # which splits some of its backwards, if it has any to spare
        assert schedule.splits == (name in ("zb-h1", "zb-h2", "zb-v", "search"))


@pytest.mark.parametrize("name", ["gpipe", "interleaved", "fill-drain", "search"])
def test_virtual_stages_loop(name):
    schedule = schedule_of(name, 3, 4, 3)
    check(schedule)
    assert schedule.placement == looped(3, 3)


@pytest.mark.parametrize("name", ["zb-v", "dualpipe-v"])
def test_folded_ones_have_two_stages_on_each_rank_anyway(name):
    assert schedule_of(name, 3, 6) == schedule_of(name, 3, 6, 2)
    assert schedule_of(name, 3, 6).placement == folded(3)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("1f1", (2, 2), "there is no schedule '1f1'; did you mean '1f1b'"),
        ("tetris", (2, 2), "there is no schedule 'tetris'; known: .*dualpipe-v"),
        ("1f1b", (2, 2, 2), "schedule 1f1b has virtual=2, but it holds one stage on each rank; le"),
        ("zb-h2", (2, 2, 3), "schedule zb-h2 has virtual=3"),
        ("zb-v", (2, 2, 3), "schedule zb-v has virtual=3, but it holds exactly two stages"),
        ("interleaved", (2, 2), "schedule interleaved has virtual=1, .* give virtual=2 or more"),
        ("gpipe", (2, 0), "schedule gpipe has microbatches=0; it must be 1 or more"),
        ("gpipe", (0, 1), "schedule gpipe has pipeline=0; it must be 1 or more"),
        ("gpipe", (1, 1, 0), "schedule gpipe has virtual=0; it must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(name, numbers, message):
    with pytest.raises(PlanError, match=message):
        schedule_of(name, *numbers)


def test_search_by_name_is_no_slower_than_zb_h1_in_its_memory():
    for ranks, microbatches in ((2, 4), (4, 8), (8, 8)):
        found, named = (schedule_of(name, ranks, microbatches) for name in ("search", "zb-h1"))
        steps = [account(timeline(each, uniform(ranks))).makespan for each in (found, named)]
        assert steps[0] <= steps[1]
        assert max(check(found).peaks) <= ranks
