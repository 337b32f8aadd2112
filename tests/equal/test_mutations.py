"""Wrong programs must fail verification: each mutation is one slip that a compiler could make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest

from meshwright.comm import local
from meshwright.compile import collective, lower
from meshwright.program import assemble
from meshwright.run import step, worker
from meshwright.run.build import Build
from tests.equal import odd
from tests.equal.harness import Case, assert_equal
from tests.equal.odd import ODD

STEPS = 2


@dataclass(frozen=True)
class Mutation:
    """A slip: what to patch, under which plan of which model, and what it must show in."""

    model: str
    plan: str
    patch: Callable[[pytest.MonkeyPatch], None]
    shows: frozenset[str]


EVERYTHING = frozenset({"loss", "gradients", "weights", "optimizer"})
NOT_LOSS = EVERYTHING - {"loss"}


def instead_of_collective(patch, wanted, answer):
    """Where `wanted(start)`, each member gets `answer(its own start, its index)` instead."""
    real = local.collective

    def collective(starts):
        if wanted(starts[0]):
            return [answer(start, index) for index, start in enumerate(starts)]
        return real(starts)

    patch.setattr(local, "collective", collective)


def gradients_are_not_reduced(patch):
    """Each rank keeps its own part of a bucket."""

    def own(start, index):
        count = len(start.tensors)
        if start.op == "reduce_scatter":
            count //= len(start.group.ranks)
            return tuple(t.clone() for t in start.tensors[index * count : (index + 1) * count])
        return tuple(tensor.clone() for tensor in start.tensors)

    instead_of_collective(patch, lambda start: start.label.startswith("gradient/"), own)


def the_weight_is_one_ranks(patch):
    """A mean over a rank's samples instead of all: 1/N is missing."""
    real = step.Totals.__getitem__
    patch.setattr(
        step.Totals,
        "__getitem__",
        lambda self, name: real(self, name) / (3 if name == "weight" else 1),
    )


def ranks_load_one_row_too_late(patch):
    real = Build.samples_of

    def samples_of(self, rank, range_):
        start, stop = real(self, rank, range_)
        last = stop == range_[1]
        return (start, stop) if last else (start + 1, stop + 1)

    patch.setattr(Build, "samples_of", samples_of)


def every_rank_loads_the_first_rows(patch):
    real = Build.samples_of
    patch.setattr(Build, "samples_of", lambda self, _, range_: real(self, 0, range_))


def masks_start(change):
    def mutate(patch):
        real = lower.draw
        patch.setattr(
            lower,
            "draw",
            lambda kind, size, n, sample, start, position: real(
                kind, size, n, sample, change(start), position
            ),
        )

    return mutate


def masks_repeat_each_step(patch):
    real = worker.position_operand
    patch.setattr(worker, "position_operand", lambda seed, first, step, k: real(seed, 0, 0, k))


def updated_weights_are_not_gathered(patch):
    patch.setattr(collective, "_lay", lambda *_: None)


def statistics_are_local(patch):
    """What batch norm sums over the ranks is this rank's sum, scaled up."""
    instead_of_collective(
        patch,
        lambda start: "odd.py" in start.label and start.op == "all_reduce",
        lambda start, _: tuple(tensor * len(start.group.ranks) for tensor in start.tensors),
    )


def buffers_are_not_committed(patch):
    real = step.StepWork.commit

    def commit(self, values):
        for name in [name for name in values if name.startswith("next/")]:
            del values[name]
        return real(self, values)

    patch.setattr(step.StepWork, "commit", commit)


def accumulators_are_assigned(patch):
    patch.setattr(assemble, "accumulated", lambda unit, *, first: unit)


def one_total_is_assigned(name):
    def mutate(patch):
        real = assemble.accumulated

        def accumulated(unit, *, first):
            whole = real(unit, first=first)
            raw = dict(unit.outputs)[name]
            outputs = tuple((n, raw if n == name else value) for n, value in whole.outputs)
            return replace(whole, outputs=outputs)

        patch.setattr(assemble, "accumulated", accumulated)

    return mutate


def whole_parameters_count_on_every_rank(patch):
    real = worker.initial_state

    def initial_state(*args):
        state = real(*args)
        state.counted = frozenset(state.trained)
        return state

    patch.setattr(worker, "initial_state", initial_state)


MUTATIONS = {
    "gradients are not reduced": Mutation("plain", "data=2", gradients_are_not_reduced, NOT_LOSS),
    "gradients are not reduced, zero2": Mutation(
        "plain", "zero2,data=2", gradients_are_not_reduced, NOT_LOSS
    ),
    "1/N is missing": Mutation("plain", "data=3", the_weight_is_one_ranks, EVERYTHING),
    "rows start one too late": Mutation("plain", "data=2", ranks_load_one_row_too_late, EVERYTHING),
    "all ranks load the same rows": Mutation(
        "plain", "zero1,data=2", every_rank_loads_the_first_rows, EVERYTHING
    ),
    "masks one row off": Mutation(
        "padding index", "data=2", masks_start(lambda start: start + 1), EVERYTHING
    ),
    "masks start at zero": Mutation(
        "padding index", "data=2", masks_start(lambda start: 0), EVERYTHING
    ),
    "masks repeat each step": Mutation(
        "padding index", "data=2", masks_repeat_each_step, EVERYTHING
    ),
    "no gather, zero1": Mutation(
        "plain", "zero1,data=2", updated_weights_are_not_gathered, frozenset({"weights"})
    ),
    "no gather, zero2": Mutation(
        "plain", "zero2,data=3", updated_weights_are_not_gathered, frozenset({"weights"})
    ),
    "statistics are local": Mutation(
        "batch norm 1d", "data=2", statistics_are_local, frozenset({"loss", "weights"})
    ),
    "buffers are forgotten": Mutation(
        "batch norm 1d", "data=2", buffers_are_not_committed, frozenset({"weights"})
    ),
    "accumulators are assigned": Mutation(
        "plain", "data=2,microbatches=3", accumulators_are_assigned, EVERYTHING
    ),
    "the weight is one micro-batch's": Mutation(
        "sum and weight", "data=2,microbatches=2", one_total_is_assigned("total/weight"), EVERYTHING
    ),
    "the loss is one micro-batch's": Mutation(
        "plain", "zero3,data=2,microbatches=2", one_total_is_assigned("total/loss"),
        frozenset({"loss"}),
    ),
    "a gradient is one micro-batch's": Mutation(
        "plain", "zero2,data=2,microbatches=2", one_total_is_assigned("gradient/up.weight"),
        NOT_LOSS,
    ),
    "the norm counts replicas": Mutation(
        "groups, clipping, schedule", "data=2", whole_parameters_count_on_every_rank, NOT_LOSS
    ),
}  # fmt: skip

MODELS = {**ODD, "plain": lambda: odd.job(odd.Plain)}


@cache
def case(name):
    return Case(MODELS[name]())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_fails_verification(name, monkeypatch):
    mutation = MUTATIONS[name]
    made = case(mutation.model)
    assert_equal(made.verify(mutation.plan, STEPS))
    mutation.patch(monkeypatch)
    report = made.verify(mutation.plan, STEPS)
    wrong = {kind for kind, worst in report.worst.items() if worst.error > 1e-6}
    assert not report.passed
    assert mutation.shows <= wrong
