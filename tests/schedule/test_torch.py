"""Orders agree with torch's own generators, action by action, wherever torch has the schedule."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from meshwright.schedule.action import Schedule
from meshwright.schedule.check import check
from meshwright.schedule.named import schedule_of
from meshwright.schedule.placement import looped
from meshwright.schedule.simulate import account, timeline, uniform
from meshwright.schedule.text import from_text, to_text
from tests.schedule.torch_orders import order, theirs

RANKS = range(1, 9)


def counts(ranks):
    return (ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 3, 4 * ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_stage_per_rank(name, ranks):
    for microbatches in counts(ranks):
        ours = schedule_of(name, ranks, microbatches).ranks
        theirs = order(name, ranks, microbatches)
        assert ours[:-1] == theirs[:-1]
        # torch 2.13 counts the forwards of 1F1B's last rank from 1: its picture has no 7F0.
        off = name == "1f1b"
        assert ours[-1] == tuple(
            replace(action, microbatch=action.microbatch - (off and action.kind == "F"))
            for action in theirs[-1]
        )


@pytest.mark.parametrize("virtual", [2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_interleaved_wherever_torch_allows_the_number(ranks, virtual):
    for microbatches in (*counts(ranks), *range(1, ranks)):
        if microbatches % max(1, microbatches // ranks):
            continue  # torch refuses these
        ours = schedule_of("interleaved", ranks, microbatches, virtual)
        assert ours.ranks == order("interleaved", ranks, microbatches, virtual)


@pytest.mark.parametrize("ranks", RANKS)
def test_zb_h1_is_torchs_interleaved_zero_bubble_of_one_chunk(ranks):
    for microbatches in (*counts(ranks), *range(1, ranks)):
        if microbatches % max(1, microbatches // ranks):
            continue
        ours = schedule_of("zb-h1", ranks, microbatches)
        assert ours.ranks == order("interleaved-zb", ranks, microbatches)


@pytest.mark.parametrize("ranks", RANKS)
def test_zb_v(ranks):
    for microbatches in (*counts(ranks), *range(1, ranks)):
        assert schedule_of("zb-v", ranks, microbatches).ranks == order(
            "zb-v", ranks, microbatches, 2
        )


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipe_v_from_two_micro_batches_per_rank_on(ranks):
    for microbatches in (2 * ranks, 2 * ranks + 1, 4 * ranks, 5 * ranks + 2):
        assert schedule_of("dualpipe-v", ranks, microbatches).ranks == order(
            "dualpipe-v", ranks, microbatches, 2
        )


@pytest.mark.parametrize("ranks", RANKS)
def test_gpipe_in_a_loop_costs_what_torchs_does(ranks):
    # torch takes the backwards of a chunk last first; we take them first first, as without a loop.
    for microbatches in counts(ranks):
        ours = schedule_of("gpipe", ranks, microbatches, 2)
        found = order("looped", ranks, microbatches, 2)
        other = Schedule("looped", looped(ranks, 2), microbatches, found)
        assert check(ours) == check(other)
        seconds = uniform(2 * ranks)
        assert account(timeline(ours, seconds)) == account(timeline(other, seconds))


def test_torch_reads_what_we_write_and_we_read_what_torch_writes():
    ours = schedule_of("dualpipe-v", 4, 9)
    for line, wanted in zip(
        csv.reader(io.StringIO(to_text(ours))), order("dualpipe-v", 4, 9, 2), strict=True
    ):
        assert [str(theirs._Action.from_str(item)) for item in line] == [str(a) for a in wanted]
    lines = io.StringIO(newline="")
    me = theirs.ScheduleDualPipeV
    for rank in range(4):
        shell = _shell(4, 9)
        csv.writer(lines).writerow(me._calculate_single_rank_operations(shell, rank))
    assert from_text(lines.getvalue(), "dualpipe-v") == ours


def _shell(ranks, microbatches):
    from types import SimpleNamespace

    return SimpleNamespace(pp_group_size=ranks, _num_stages=2 * ranks, _n_microbatches=microbatches)
