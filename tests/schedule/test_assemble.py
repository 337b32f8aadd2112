"""Assembly: lists that send what is read, keep what is due, and leave nothing behind."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest

from meshwright.plan.mesh import Axis
from meshwright.schedule.assemble import assemble_stages
from meshwright.schedule.named import schedule_of
from meshwright.schedule.post import Post, tied_axis
from tests.program.chains import chain
from tests.schedule.test_locals import micro, states

NAMES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
DATA = (Axis("data", 2),)


def compiled(program, layers, name="1f1b", microbatches=3, axes=(), zero=0):
    """Every pipeline rank's, of the first along each axis."""
    made = micro(program, layers, axes, zero=zero)
    paired = name in ("zb-v", "dualpipe-v")
    ranks = (len(layers) + 1) // (2 if paired else 1)
    schedule = schedule_of(name, ranks, microbatches)
    homes = {
        n.removeprefix("model/"): tuple(sorted({schedule.placement[s] for s in stages}))
        for n, stages in made.tasks.placement.homes.items()
    }
    laid = states(program, axes, zero)
    width = prod(axis.size for axis in axes)
    peers = tuple((rank * width,) for rank in range(ranks))
    seats = [Post(r, 0, peers, axes, {a.name: 0 for a in axes}, homes) for r in range(ranks)]
    return [assemble_stages(schedule, [made] * microbatches, laid, s).instructions for s in seats]


def kinds(found):
    return Counter(each.kind for each in found.body)


def calls(found):
    """Of the collectives that it starts, what they are and over which axis."""
    starts = [each for each in found.body if each.kind == "Start"]
    return Counter((found.calls[each.segment][0].name, each.axis) for each in starts)


def traffic(found, kind):
    """(peer, label, values) of what it sends or receives, in order."""
    told = [each for each in found.body if each.kind == kind]
    return [
        (i.peer, found.messages[i.segment].label, found.messages[i.segment].values) for i in told
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_is_received_in_the_same_order(name):
    lists = compiled(chain(0, 1, 2, 3, 4, 5, skip=True), [1, 2, 3, 4, 5], name)
    for here, mine in enumerate(lists):
        for there, other in enumerate(lists):
            sends = [(label, v) for peer, label, v in traffic(mine, "Send") if peer == there]
            found = [(label, v) for peer, label, v in traffic(other, "Recv") if peer == here]
            assert sends == found


def test_each_micro_batch_is_sent_once_each_way():
    first, last = compiled(chain(0, 1), [1])
    for found in (first, last):
        assert kinds(found)["Send"] == kinds(found)["Recv"] == 3
        waited = [each for each in found.body if each.kind == "Wait" and each.peer is not None]
        assert len(waited) == 6  # every send and every receive


@pytest.mark.parametrize("name", NAMES)
def test_every_start_is_waited_for(name):
    for found in compiled(chain(0, 1, 2, 3), [1, 2, 3], name, axes=DATA, zero=3):
        begun = Counter(v for each in found.body if each.kind in ("Start", "Send", "Recv")
                        for v in each.outputs)  # fmt: skip
        ended = Counter(each.inputs[0] for each in found.body if each.kind == "Wait")
        assert begun == ended
        assert set(begun.values()) == {1}


def left(found):
    """What is there after a step that was not before it."""
    live = set()
    for each in found.body:
        if each.kind == "Free":
            live.difference_update(each.inputs)
        elif each.kind not in ("Finish", "Agree", "Update", "Commit"):
            if each.kind == "Wait":
                live.discard(each.inputs[0])
            live.update(each.outputs)
    return live


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [0, 3])
def test_no_value_of_a_micro_batch_is_left(name, zero):
    """What stays is what Finish, Update and Commit take."""
    for found in compiled(chain(0, 1, 2, 0), [1, 2, 3], name, axes=DATA, zero=zero):
        stays = left(found)
        assert not [v for v in stays if ":" in v or v.startswith("~")]
        assert {v.partition("/")[0] for v in stays} <= {"reduced", "total", "gathered"}


@pytest.mark.parametrize("name", NAMES)
def test_values_are_there_when_they_are_read(name):
    for found in compiled(chain(0, 1, 2, 0), [1, 2, 3], name):
        live, state = set(), ("model/", "scale", "position")
        for each in found.body:
            if each.kind in ("Finish", "Agree", "Update", "Commit"):
                continue
            missing = [v for v in each.inputs if v not in live and not v.startswith(state)]
            assert not missing, (str(each), missing)
            if each.kind == "Free":
                live.difference_update(each.inputs)
            live.update(each.outputs)


def test_a_tied_gradient_is_summed_once_a_step():
    first, middle, last = compiled(chain(0, 1, 0), [1, 2])
    axis = tied_axis((0, 2))
    assert calls(first) == calls(last) == {("comm.all_reduce", axis): 1}
    assert not calls(middle)


def test_what_is_tied_alike_is_summed_in_one_bucket():
    first, last = compiled(chain(0, 1, 0, 1), [2])
    for found in (first, last):
        (start,) = [each for each in found.body if each.kind == "Start"]
        assert len(found.calls[start.segment]) == 2


def test_two_stages_of_one_rank_need_no_sum():
    """Folded like a V, the first stage and the last are on one rank."""
    for found in compiled(chain(0, 1, 2, 0), [1, 2, 3], "zb-v"):
        assert not calls(found)


def test_a_tied_gradient_of_replicas_is_reduced_over_them_first():
    first, last = compiled(chain(1, 0, 2, 0), [2], axes=DATA)
    for found in (first, last):
        order = [each.axis for each in found.body if each.kind == "Start"]
        assert order[-1] == tied_axis((0, 1))
        assert order.count(tied_axis((0, 1))) == 1
        assert set(order[:-1]) == {"data"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_reduced_once_a_step(name):
    for found in compiled(chain(0, 1, 2, 3), [1, 2, 3], name, axes=DATA):
        reduced = [
            op for each in found.body if each.kind == "Start" for op in found.calls[each.segment]
        ]
        assert len(reduced) == (2 if name in ("zb-v", "dualpipe-v") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_sums_begin_anew_once_a_step(name):
    """Every later micro-batch adds to them in place, so no accumulator is cleared."""
    for here, found in enumerate(compiled(chain(0, 1, 2, 3), [1, 2, 3], name, microbatches=4)):
        runs = [found.segments[each.segment] for each in found.body if each.kind == "Run"]
        adds = Counter(op.name for run in runs for op in run.ops)
        folded = name in ("zb-v", "dualpipe-v")
        loss = here == (0 if folded else 3)
        assert adds["aten.add_.Tensor"] + adds["aten.add.Tensor"] == 3 * (1 + folded + loss)


def test_a_micro_batch_is_loaded_once_where_it_is_read():
    first, last = compiled(chain(0, 1), [1])
    assert [e.microbatch for e in first.body if e.kind == "Load"] == [0, 1, 2]
    assert {e.outputs for e in first.body if e.kind == "Load"} == {
        (f"{k}:batch/x",) for k in range(3)
    }
    assert {e.outputs for e in last.body if e.kind == "Load"} <= {()}


def test_equal_micro_batches_are_one_segment():
    few, many = (compiled(chain(0, 1), [1], microbatches=n)[0] for n in (3, 12))
    assert len(many.segments) == len(few.segments)
    assert len(many.messages) == len(few.messages)


def test_at_most_as_many_micro_batches_live_as_the_schedule_says():
    """What a forward keeps for its backward: all of them with GPipe, two with 1F1B."""

    def peak(name):
        found = compiled(chain(0, 1), [1], name, microbatches=8)[0]
        live, most = set(), 0
        for each in found.body:
            if each.kind == "Free":
                live.difference_update(each.inputs)
            elif each.kind == "Load":
                live.update(each.outputs)
            most = max(most, len(live))
        return most

    assert (peak("gpipe"), peak("1f1b")) == (8, 2)
