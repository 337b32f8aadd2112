"""What is saved for a budget: brute force on small programs agrees, and holds what it says."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.predict.memory import live_bytes
from meshwright.predict.remat import fitting, least
from meshwright.predict.saving import account, saving_of
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.remat import rematerialised


class Writer:
    """A micro-batch under construction; a value's bytes are its elements."""

    def __init__(self):
        self.values = [Value("uint8", (1,))]
        self.ops = []

    def op(self, reads, sizes, phase="forward", name="aten.mm.default"):
        made = []
        for size in sizes:
            self.values.append(Value("uint8", (size,)))
            made.append(len(self.values) - 1)
        args = tuple(map(Ref, reads))
        self.ops.append(Op(name, args, (), tuple(made), packed=len(made) > 1, phase=phase))
        return made

    def program(self, *outputs):
        named = tuple((f"gradient/{k}", value) for k, value in enumerate(outputs))
        return Program(tuple(self.values), (("batch/x", 0),), tuple(self.ops), named)


def layers(*sizes):
    """A chain whose backward reads what each layer made, from the last to the first."""
    writer, made = Writer(), [0]
    for size in sizes:
        made += writer.op(made[-1:], [size])
    gradient = writer.op([made[-1]], [1], "backward")[0]
    for value in reversed(made[1:]):
        gradient = writer.op([gradient, value], [1], "backward")[0]
    return writer.program(gradient)


@st.composite
def programs(draw):
    """Few forward ops over random earlier values, some with two results; a backward over them."""
    writer, made = Writer(), [0]
    for _ in range(draw(st.integers(2, 6))):
        reads = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))
        view = draw(st.integers(0, 5)) == 0
        if view:
            size = writer.values[reads[0]].elements
            made += writer.op(reads[:1], [size], name="aten.view.default")
        else:
            sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=2))
            made += writer.op(reads, sizes)
    gradient = writer.op([made[-1]], [draw(st.integers(1, 5))], "backward")[0]
    for _ in range(draw(st.integers(1, 5))):
        reads = draw(st.lists(st.sampled_from(made[1:]), min_size=1, max_size=2))
        gradient = writer.op([gradient, *reads], [draw(st.integers(1, 5))], "backward")[0]
    return writer.program(gradient)


def savings(program, data):
    sizes = [value.elements for value in program.values]
    costs = [float(data.draw(st.integers(1, 9))) for _ in program.ops]
    copies = {n: data.draw(st.integers(1, 3)) for n, _ in enumerate(program.ops)}
    return saving_of(program, sizes, costs, copies)


def every_choice(saving):
    values = list(saving.storages)
    for count in range(len(values) + 1):
        yield from map(frozenset, combinations(values, count))


@settings(max_examples=60, deadline=None)
@given(programs(), st.data())
def test_the_choice_for_a_limit_is_that_of_trying_all(program, data):
    saving = savings(program, data)
    told = [account(saving, kept) for kept in every_choice(saving)]
    limit = data.draw(st.integers(min(t.peak for t in told) - 2, max(t.peak for t in told) + 2))
    fits = [each.cost for each in told if each.peak <= limit]
    best = fitting(saving, limit)
    if not fits:
        assert best is None
    else:
        assert best is not None
        assert best.proved
        found = account(saving, best.kept)
        assert found.peak <= limit
        assert found.cost == min(fits)


@settings(max_examples=40, deadline=None)
@given(programs(), st.data())
def test_the_least_is_that_of_trying_all(program, data):
    saving = savings(program, data)
    best = least(saving)
    assert best.proved
    smallest = min(account(saving, kept).peak for kept in every_choice(saving))
    assert smallest <= account(saving, best.kept).peak <= smallest + max(1, smallest // 100)


@settings(max_examples=100, deadline=None)
@given(programs(), st.data())
def test_a_program_never_holds_more_than_the_account_says(program, data):
    saving = saving_of(program, [v.elements for v in program.values], [1.0] * len(program.ops))
    kept = data.draw(st.sets(st.sampled_from(list(saving.storages))) if saving.storages
                     else st.just(set()))  # fmt: skip
    told = account(saving, kept)
    again = rematerialised(program, frozenset(kept)).program
    assert live_bytes(again)[1] <= told.peak
    everything = account(saving, saving.storages)
    assert everything.cost == 0
    assert everything.peak == live_bytes(program)[1]


def test_micro_batches_in_flight_hold_as_many_copies():
    program = layers(10, 10, 10)
    sizes = [value.elements for value in program.values]
    costs = [1.0] * len(program.ops)
    one = saving_of(program, sizes, costs)
    four = saving_of(program, sizes, costs, dict.fromkeys(range(len(program.ops)), 4))
    kept = frozenset(one.storages)
    assert account(four, kept).peak == account(one, kept).peak + 3 * 30
    assert account(four, ()).peak == account(one, ()).peak


@pytest.mark.parametrize(
    ("limit", "again"), [(63, set()), (60, {1}), (59, {0}), (43, {0}), (42, {0, 1})]
)
def test_as_little_work_is_done_again_as_the_limit_leaves(limit, again):
    """The second op costs least; but the third is made of it, so that it comes back beside it."""
    program = layers(20, 20, 20, 1)
    sizes = [value.elements for value in program.values]
    costs = [3.0, 1.0, 2.0, 1.0, *[1.0] * (len(program.ops) - 4)]
    saving = saving_of(program, sizes, costs)
    best = fitting(saving, limit)
    assert account(saving, best.kept).repeated == again
    assert fitting(saving, 41) is None


def test_without_scipy_the_way_out_is_told(monkeypatch):
    import sys

    from meshwright.errors import PlanError

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    saving = saving_of(layers(5, 5), [value.elements for value in layers(5, 5).values], [1.0] * 9)
    with pytest.raises(PlanError, match="pip install"):
        fitting(saving, 9)
