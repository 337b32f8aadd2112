"""Messages: what ranks send one another, once each, straight to where it is read."""

from __future__ import annotations

from collections import Counter

import pytest

from meshwright.schedule.messages import messages
from meshwright.schedule.named import SCHEDULES, schedule_of
from tests.program.chains import BYTES, chain, tasks

ONE_WAY = ("gpipe", "1f1b", "zb-h1", "zb-h2")


def sent(cut, name, ranks, microbatches=3, virtual=1):
    schedule = schedule_of(name, ranks, microbatches, virtual)
    return schedule, messages(schedule, [cut] * microbatches)


def ways(found):
    """(source, target) -> how many messages."""
    return Counter((each.source, each.target) for each in found)


@pytest.mark.parametrize("name", ONE_WAY)
def test_neighbours_send_one_value_each_way_for_each_micro_batch(name):
    cut = tasks(chain(0, 1, 2), 1, 2)
    _, found = sent(cut, name, 3)
    assert ways(found) == {(0, 1): 3, (1, 2): 3, (2, 1): 3, (1, 0): 3}
    assert all(len(each.values) == 1 for each in found)
    assert sum(cut.whole.values[v].bytes for each in found for v in each.values) == 12 * BYTES


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_skip_edge_goes_straight_to_its_reader_once(name):
    """The first stage's result is read at the third and the fourth, not passed on by others."""
    program = chain(0, 1, 2, 3, skip=True)
    cut = tasks(program, 1, 2, 3)
    _, found = sent(cut, name, 4)
    # The last layer adds what the first one made; its gradient goes where the paths join.
    skipped = program.ops[0].results[0]
    assert [(s.source, s.target) for s in found if skipped in s.values] == [(0, 1), (0, 3)] * 3
    assert ways(found)[0, 3] == 3
    assert ways(found)[0, 2] == 0
    assert ways(found)[3, 0] == 0


def test_two_stages_of_one_rank_send_one_another_nothing():
    cut = tasks(chain(0, 1, 2, 3), 1, 2, 3)
    schedule, found = sent(cut, "zb-v", 2)
    assert schedule.placement == (0, 1, 1, 0)
    assert ways(found) == {(0, 1): 6, (1, 0): 6}
    assert not [each for each in found if each.source == each.target]


def test_a_value_that_two_stages_of_a_rank_read_is_sent_once():
    program = chain(0, 1, 2, 3, skip=True)
    cut = tasks(program, 1, 2, 3)
    schedule, found = sent(cut, "interleaved", 2, virtual=2)
    assert schedule.placement == (0, 1, 0, 1)
    skipped = program.ops[0].results[0]
    mine = [each for each in found if skipped in each.values]
    assert [(each.source, each.target) for each in mine] == [(0, 1)] * 3
    assert {(each.needed.stage, each.needed.kind) for each in mine} == {(1, "F")}


def test_a_gradient_is_sent_by_the_half_that_makes_it_for_the_half_that_reads_it():
    cut = tasks(chain(0, 1, 2), 1, 2)
    _, found = sent(cut, "zb-h1", 3)
    back = Counter(
        (s.action.stage, s.action.kind, s.needed.stage, s.needed.kind)
        for s in found
        if s.source > s.target
    )
    assert back == {(2, "I", 1, "I"): 3, (1, "I", 0, "W"): 3}


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "fill-drain"])
def test_every_message_is_sent_before_it_is_needed(name):
    """In the order of each rank; those of a pair arrive as they are sent."""
    virtual = 2 if name == "interleaved" else 1
    count = 6 if virtual == 2 or name in ("zb-v", "dualpipe-v") else 3
    cut = tasks(chain(*range(count), skip=True), *range(1, count))
    schedule, found = sent(cut, name, 3, microbatches=5, virtual=virtual)
    place = {a: n for actions in schedule.ranks for n, a in enumerate(actions)}
    for source in range(3):
        mine = [place[each.action] for each in found if each.source == source]
        assert mine == sorted(mine)
    for each in found:
        assert each.action in schedule.ranks[each.source]
        assert each.needed in schedule.ranks[each.target]
        assert each.action.microbatch == each.needed.microbatch
    read = {
        (stage, kind, k, v)
        for actions in schedule.ranks
        for stage, kind, k in ((a.stage, a.kind, a.microbatch) for a in actions)
        for v in cut.task((stage, kind)).reads
    }
    arrived = {(each.target, each.needed.microbatch, v) for each in found for v in each.values}
    for stage, kind, k, value in read:
        rank = schedule.placement[stage]
        makers = cut.makers(value, (stage, kind))
        here = {schedule.placement[maker] for maker, _ in makers} == {rank}
        assert here or (rank, k, value) in arrived


def test_forms_of_micro_batches_may_differ():
    """Each is cut by itself; a skip edge is in one of them only."""
    plain, skip = tasks(chain(0, 1, 2), 1, 2), tasks(chain(0, 1, 2, skip=True), 1, 2)
    schedule = schedule_of("1f1b", 3, 3)
    found = messages(schedule, [plain, skip, plain])
    assert [s.action.microbatch for s in found if (s.source, s.target) == (0, 2)] == [1]


def test_labels_are_alike_for_all_micro_batches():
    cut = tasks(chain(0, 1), 1)
    _, found = sent(cut, "1f1b", 2)
    assert {each.label for each in found} == {"0F for 1F", "1B for 0B"}
