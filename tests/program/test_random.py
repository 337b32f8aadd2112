"""Random programs under random annotations: every law of propagation and partitioning.

Each law has a check of one case; a few hundred cases are drawn with every run of the tests, ten
times as many under `-m matrix`. What was found once stays as an example (`found.py`).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings

from meshwright.program.explain import moved
from meshwright.program.layout import Layout, Shard, respelled
from meshwright.program.partition import partition
from meshwright.program.propagate import propagate
from tests.program.cases import Case, cases
from tests.program.found import FOUND
from tests.program.graphs import close
from tests.program.played import collectives, play, travels
from tests.program.worlds import assert_holds, everywhere


def equal(case):
    """Ranks together compute what one does, and deliver it where it was said."""
    played = play(case)
    near = close(*case.graph.tensors)
    for name, value in case.program.outputs:
        laid = played.laid(name)
        wanted = case.delivered.get(name, laid)
        assert respelled(case.graph.shape(value), laid, wanted, case.axes) == wanted
        parts = [rank[name] for rank in played.found]
        assert_holds(parts, case.graph.tensors[value], laid, case.axes, near)
    return played


def told(case, played):
    """What the explanation says of each move is what its request moves."""
    sizes = {axis.name: axis.size for axis in case.axes}
    for rank, (local, starts) in enumerate(zip(played.locals, played.requests, strict=True)):
        for op, start in zip(collectives(local), starts, strict=True):
            assert moved(op, local.program, sizes[op.args[1]]) == travels(start, rank), (op, rank)


def in_step(case, played):
    """All ranks of a group start the same collectives, in one order."""
    groups = {}
    for rank, starts in enumerate(played.requests):
        for start in starts:
            said = (start.op, start.reduce, start.label, len(start.tensors))
            groups.setdefault(start.group, {}).setdefault(rank, []).append(said)
    for group, told_ in groups.items():
        assert set(told_) == set(group.ranks)
        assert len({tuple(said) for said in told_.values()}) == 1, group


def values_and_moves(case):
    played = equal(case)
    told(case, played)
    in_step(case, played)


def chosen(case):
    """(value, axis) -> what the user said of it; an annotation inside the program goes first."""
    found = {}
    for layouts in (case.wanted, case.pinned):
        for value, layout in layouts.items():
            for axis in case.axes:
                place = layout.on(axis.name)
                if place is not None or layouts is case.pinned:
                    found[value, axis.name] = place
    for op in case.program.ops:
        if op.base == "meshwright.annotate":
            (value,), (_, dims, whole) = op.results, op.args
            found |= {(value, name): Shard(k) for k, name in enumerate(dims.split(",")) if name}
            found |= {(value, name): None for name in whole.split(",") if name}
    sizes = {axis.name: axis.size for axis in case.axes}
    return {key: place for key, place in found.items() if sizes[key[1]] > 1}


def kept(case):
    """What the user chose is never undone: closed dims are split as said, and no further."""
    completed = propagate(case.program, case.axes, *case.annotations)
    inputs = {value: k for k, (_, value) in enumerate(case.program.inputs)}
    for (value, axis), place in chosen(case).items():
        rests = value in case.stored and case.stored[value].on(axis) is not None
        if not rests:
            assert completed.places[axis].get(value) == place, (value, axis)
        if value in inputs and not rests and value in case.pinned:
            assert completed.inputs[inputs[value]].on(axis) == place
    for value, layout in case.stored.items():
        for axis, place in layout.placements:
            assert completed.inputs[inputs[value]].on(axis) == place
    annotated = [op.results[0] for op in case.program.ops if op.base == "meshwright.annotate"]
    lies = Case(case.graph, tuple(annotated), case.axes, *case.annotations)
    local = partition(lies.program, completed, case.axes, everywhere(case.axes)[0], {})
    for value, (_, out) in zip(annotated, local.program.outputs, strict=True):
        said = {axis: place for (v, axis), place in chosen(case).items() if v == value}
        laid = local.origin[out][1]
        wanted = Layout.of(case.axes, {**dict(laid.placements), **said})
        assert respelled(case.graph.shape(value), laid, wanted, case.axes) == wanted


def grows(case):
    """An annotation more undoes nothing that was chosen without it."""
    whole = propagate(case.program, case.axes, *case.annotations)
    for k, layouts in enumerate(case.annotations):
        for value in layouts:
            less = [dict(found) for found in case.annotations]
            del less[k][value]
            fewer = Case(case.graph, case.outputs, case.axes, *less)
            before = propagate(fewer.program, case.axes, *fewer.annotations)
            for (other, axis), place in chosen(fewer).items():
                if other != value:
                    found = [c.places[axis].get(other) for c in (before, whole)]
                    rests = other in case.stored and case.stored[other].on(axis) is not None
                    assert rests or found == [place, place]


def settled(case):
    """To complete what is complete changes nothing."""
    first = propagate(case.program, case.axes, *case.annotations)
    pinned = dict(case.pinned)
    for (_, value), layout in zip(case.program.inputs, first.inputs, strict=True):
        if value not in case.stored:
            pinned[value] = layout
    places = {value: dict(layout.placements) for value, layout in case.wanted.items()}
    for axis, found in first.places.items():
        for value, place in found.items():
            places.setdefault(value, {})[axis] = place
    wanted = {v: Layout.of(case.axes, p) for v, p in places.items()}
    again = propagate(case.program, case.axes, pinned, case.stored, wanted)
    assert again.inputs == first.inputs
    assert {a: _shards(f) for a, f in again.places.items()} == {
        a: _shards(f) for a, f in first.places.items()
    }
    assert again.carried == first.carried


def _shards(found):
    return {value: place for value, place in found.items() if place is not None}


def lawful(case):
    """All the laws."""
    values_and_moves(case)
    kept(case)
    grows(case)
    settled(case)


THOROUGH = {"suppress_health_check": list(HealthCheck)}


def found(test):
    """With what failed once."""
    for make in FOUND:
        test = example(case=make())(test)
    return test


@pytest.mark.parametrize("_part", range(4))
@settings(max_examples=250, **THOROUGH)
@found
@given(case=cases())
def test_ranks_compute_what_one_does_and_move_what_is_told(_part, case):
    values_and_moves(case)


@settings(max_examples=500, **THOROUGH)
@found
@given(case=cases())
def test_what_was_chosen_is_kept(case):
    kept(case)


@settings(max_examples=400, **THOROUGH)
@found
@given(case=cases())
def test_an_annotation_more_undoes_nothing(case):
    grows(case)


@settings(max_examples=500, **THOROUGH)
@found
@given(case=cases())
def test_what_is_complete_is_not_changed(case):
    settled(case)


@pytest.mark.matrix
@pytest.mark.parametrize("_part", range(50))
@settings(max_examples=500, **THOROUGH)
@given(case=cases())
def test_every_law_many_times(_part, case):
    lawful(case)
