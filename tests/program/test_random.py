"""Random programs under random annotations: every law of propagation and partitioning.

Each law has a check of one case; a few hundred cases are drawn with every run of the tests, ten
times as many under `-m matrix`. What was found once stays as an example (`found.py`).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings

from meshwright.program.explain import moved
from meshwright.program.layout import Layout, Partial, Shard, respelled
from meshwright.program.propagate import propagate
from tests.program.cases import cases
from tests.program.graphs import close
from tests.program.played import collectives, play, travels
from tests.program.worlds import assert_holds


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


THOROUGH = {"suppress_health_check": list(HealthCheck)}


@settings(max_examples=1500, **THOROUGH)
@given(case=cases())
def test_ranks_compute_what_one_does_and_move_what_is_told(case):
    values_and_moves(case)


@pytest.mark.matrix
@settings(max_examples=15_000, **THOROUGH)
@given(case=cases())
def test_many_times_ranks_compute_what_one_does(case):
    values_and_moves(case)
