"""The laws of random programs can fail: each mutation is one slip that a compiler could make."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, Phase, find, settings

from meshwright.comm import local
from meshwright.program import explain, layout, partition, propagate
from meshwright.program.program import Ref
from meshwright.program.rules import RULES
from meshwright.program.rules.factor import einsum
from tests.program import steps_algebra, steps_layers, steps_shape
from tests.program.cases import STEPS, cases
from tests.program.found import FOUND
from tests.program.test_random import kept, settled, values_and_moves

TRIES = 400
"""A mutation must show within so many programs."""


def rectified(draw, graph, x):
    graph.call("relu.default", Ref(x))


SUMS = ((steps_algebra.linear, steps_algebra.total, steps_algebra.unary),)
"""Steps that leave sums owing, and one that is not linear."""

RECTIFIED = ((steps_algebra.linear, rectified),)

LOOKUPS = ((steps_shape.looked_up,),)


@dataclass(frozen=True)
class Mutation:
    """A slip: what to patch, the law that it breaks, and steps of programs that show it soon."""

    patch: Callable[[pytest.MonkeyPatch], None]
    law: Callable = values_and_moves
    steps: tuple = STEPS


def rule(name, change):
    """The rule of an op, changed."""

    def mutate(patch):
        real = RULES[name]
        patch.setitem(RULES, name, lambda view: change(real(view)))

    return mutate


def a_maximum_is_added_up(found):
    return replace(found, reduction="sum")


def it_lets_sums_through(found):
    return replace(found, linear=(frozenset({0}),))


def nothing_is_whole(found):
    return replace(found, whole=frozenset())


def a_bias_counts_on_every_rank(found):
    return replace(found, addends=frozenset())


def a_join_is_in_one_piece(patch):
    """Parts side by side are taken for one run."""

    def cat(view):
        rank = len(view.results[0].shape)
        letters = " ".join(f"d{k}" for k in range(rank))
        return einsum(view, [letters] * len(view.operands), [letters])

    patch.setitem(RULES, "aten.cat", cat)


def chunks_begin_too_early(patch):
    """Where they are not even, each but the first by one."""

    def chunk(n, parts, index):
        each, more = divmod(n, parts)
        late = index > 0 and more > 0
        return index * each + min(index, more) - late, each + (index < more)

    patch.setattr(layout, "chunk", chunk)


def sums_are_not_taken(patch):
    real = local.collective

    def collective(starts):
        if starts[0].op == "all_reduce":
            return [tuple(tensor.clone() for tensor in start.tensors) for start in starts]
        return real(starts)

    patch.setattr(local, "collective", collective)


def a_partial_is_lost(patch):
    """What owes a sum is delivered as if it owed none."""
    patch.setattr(partition, "Partial", lambda op="sum": None)


def windows_begin_at_the_first_row(patch):
    real = partition._Writer._begins

    def begins(self, shape, lies):
        return tuple((axis, (0,) * len(starts)) for axis, starts in real(self, shape, lies))

    patch.setattr(partition._Writer, "_begins", begins)


def one_rank_pays_alone(patch):
    real = partition._Writer._pay

    def pay(self, value, op):
        if not any(self.coordinates.values()):
            for axis in self.lies[value].partial_axes:
                self.early = {**self.early, axis: frozenset({value})}
        real(self, value, op)

    patch.setattr(partition._Writer, "_pay", pay)


def annotations_are_not_read(patch):
    patch.setattr(propagate, "_annotated", lambda program, axis: {})


def axes_cut_across_each_other(patch):
    patch.setattr(propagate._Search, "_free", lambda self, value, shard: True)


def ops_choose_once(patch):
    """By what they knew when they were come to first."""
    real = propagate._Search._refine

    def refine(self, at_rest):
        return real(self, [axis is not None for axis in at_rest])

    def complete(self, pinned):
        chosen = [self.axis.name in found for found in self.carried]
        self.place |= pinned
        self.closed |= set(pinned)
        self.open = set(range(len(self.program.values))) - self.closed
        real(self, chosen)
        return self.place

    patch.setattr(propagate._Search, "_refine", refine)
    patch.setattr(propagate._Search, "complete", complete)


def exchanges_are_told_as_even(patch):
    def moved(op, program, size):
        if op.name == "comm.all_to_all":
            return (size - 1) * program.values[op.inputs[0]].elements // size
        return explain_moved(op, program, size)

    explain_moved = explain.moved
    patch.setattr("tests.program.test_random.moved", moved)


MUTATIONS = {
    "a maximum is added up": Mutation(rule("aten.amax", a_maximum_is_added_up), steps=SUMS),
    "relu lets sums through": Mutation(rule("aten.relu", it_lets_sums_through), steps=RECTIFIED),
    "softmax of a part": Mutation(
        rule("aten._softmax", nothing_is_whole), steps=((steps_layers.softmax,),)
    ),
    "a bias counts on every rank": Mutation(
        rule("aten.addmm", a_bias_counts_on_every_rank), steps=SUMS
    ),
    "a join is in one piece": Mutation(a_join_is_in_one_piece),
    "chunks begin too early": Mutation(chunks_begin_too_early),
    "sums are not taken": Mutation(sums_are_not_taken, steps=SUMS),
    "a partial is lost": Mutation(a_partial_is_lost, steps=SUMS),
    "windows begin at the first row": Mutation(windows_begin_at_the_first_row, steps=LOOKUPS),
    "one rank pays alone": Mutation(one_rank_pays_alone),
    "annotations are not read": Mutation(annotations_are_not_read, kept),
    "axes cut across each other": Mutation(axes_cut_across_each_other),
    "ops choose once": Mutation(ops_choose_once, settled),
    "exchanges are told as even": Mutation(exchanges_are_told_as_even),
}


def breaks(law):
    def broken(case):
        try:
            law(case)
        except Exception:  # noqa: BLE001 - whatever a slip leads to
            return True
        return False

    return broken


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_a_law(name, monkeypatch):
    mutation = MUTATIONS[name]
    mutation.patch(monkeypatch)
    once = settings(
        max_examples=TRIES,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    broken, drawn = breaks(mutation.law), cases(4, steps=mutation.steps)
    known = (case for case in (make() for make in FOUND) if broken(case))
    case = next(known, None) or find(drawn, broken, settings=once, random=random.Random(3))
    monkeypatch.undo()
    mutation.law(case)  # it holds without the slip
