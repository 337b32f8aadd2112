"""Cuts: where stages may begin, where they begin at least cost, and where modules do."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.program.cut import at_modules, cheapest, cuttable
from meshwright.program.placing import forward_end
from meshwright.program.program import Value
from tests.program.chains import BYTES, begins, chain


def costs(program, *layers):
    """Seconds of each forward op, by layer; the loss and backward cost nothing."""
    named = {f"layers.{k}": cost for k, cost in enumerate(layers)}
    ends = forward_end(program)
    return [named.get(op.module, 0.0) if n < ends else 0.0 for n, op in enumerate(program.ops)]


def test_stages_may_begin_where_modules_do():
    program = chain(0, 1, 2)
    assert cuttable(program) == (1, 2, 3)
    assert [program.ops[n].module for n in cuttable(program)] == ["layers.1", "layers.2", "loss"]


def test_ops_of_one_module_stay_together():
    program = chain(0, 1, 2, skip=True)
    assert [op.module for op in program.ops[2:4]] == ["layers.2"] * 2
    assert cuttable(program) == (1, 2, 4)


@pytest.mark.parametrize(
    ("layers", "stages", "chosen"),
    [
        ((1, 1, 1, 1), 2, (2,)),
        ((3, 1, 1, 1), 2, (1,)),
        ((1, 1, 1, 3), 2, (3,)),
        ((1, 1, 1, 1), 4, (1, 2, 3)),
        ((1, 5, 1, 1, 1), 3, (1, 2)),
        ((2, 2, 1, 1, 1, 1), 4, (1, 2, 4)),
    ],
)
def test_the_slowest_stage_is_as_fast_as_can_be(layers, stages, chosen):
    program = chain(*range(len(layers)))
    found = cheapest(program, stages, costs(program, *layers), 0.0)
    assert found == begins(program, *chosen)


def test_backward_counts_for_the_module_of_its_forward():
    program = chain(0, 1, 2, 3)
    spent = costs(program, 1, 1, 1, 1)
    for number, op in enumerate(program.ops):
        if op.phase == "backward" and op.module == "layers.3":
            spent[number] = 2.0
    assert cheapest(program, 2, spent, 0.0) == begins(program, 3)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=7),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_no_cut_is_better_than_the_one_chosen(layers, stages, send):
    """Against all of them, to the slack of 2 % that is given for sending less."""
    program = chain(*range(len(layers)))
    spent, places = costs(program, *layers), cuttable(program)
    if len(places) < stages - 1:
        return

    def slowest(chosen):
        borders = [0, *chosen, forward_end(program)]
        sent = [0.0, *[float(send)] * len(chosen), 0.0]
        loads = zip(borders, borders[1:], sent, sent[1:], strict=False)
        return max(sum(spent[a:b]) + x + y for a, b, x, y in loads)

    # What goes from the last layer to the loss is a value, as between layers.
    found = cheapest(program, stages, spent, send / BYTES)
    best = min(map(slowest, combinations(places, stages - 1)))
    assert slowest(found) <= best * 1.02 + 1e-6


def test_of_equal_cuts_the_narrowest_is_chosen():
    program = chain(0, 1, 2, 3, 4)
    narrow = program.ops[2].results[0]
    values = tuple(
        Value("float32", (1,)) if value == narrow else made
        for value, made in enumerate(program.values)
    )
    spent = costs(program, 1, 1, 1e-6, 1, 1)
    assert cheapest(program, 2, spent, 1e-9) == begins(program, 2)
    assert cheapest(replace(program, values=values), 2, spent, 1e-9) == begins(program, 3)


def test_more_stages_than_places_are_refused():
    program = chain(0, 1, 2)
    with pytest.raises(PlanError, match=r"asks for 5 stages.*at 3 places; use 4 stages or fewer"):
        cheapest(program, 5, costs(program, 1, 1, 1), 0.0)


def test_cuts_by_modules():
    program = chain(0, 1, 2)
    assert at_modules(program, ["layers.1", "layers.2"]) == (1, 2)
    assert at_modules(program, ["layers.2", "loss"]) == (2, 3)
    assert at_modules(program, []) == ()


@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        (["layers.7"], r"module 'layers\.7', in which the traced model computes nothing"),
        (["layer"], r"module 'layer', in which"),
        (["layers.0"], r"'layers\.0', with which the model begins"),
        (["layers"], r"'layers', with which the model begins"),
        (["layers.2", "layers.1"], r"'layers\.1' after 'layers\.2'.*runs 'layers\.1' first"),
    ],
)
def test_modules_that_no_stage_can_begin_with(cuts, why):
    with pytest.raises(PlanError, match=why):
        at_modules(chain(0, 1, 2), cuts)
