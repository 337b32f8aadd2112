"""Wrong pipelines must fail verification: each mutation is one slip of cutting or assembling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest

from meshwright.plan.plan import Plan
from meshwright.program import stage
from meshwright.schedule import assemble, ties
from meshwright.schedule.locals import Micro
from tests.equal.harness import Case, assert_equal
from tests.equal.stages import STAGED
from tests.equal.test_mutations import EVERYTHING, NOT_LOSS

STEPS = 2
ONE = "pipeline={},schedule=1f1b,microbatches=3"
SPLIT = "pipeline={},schedule=zb-h1,microbatches=3"

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutation:
    """A slip: what to patch, under which plan of which model, and what it must show in."""

    model: str
    plan: str
    patch: Patch
    shows: frozenset[str] = NOT_LOSS


def tied_gradients_are_not_summed(patch):
    patch.setattr(assemble._Assembler, "ties", lambda self, states: [])


def one_home_brings_nothing_to_the_sum(patch):
    """What a stage found is taken for zero."""
    real = ties._tie

    def tie(micro, names, given, states, seat):
        return real(micro, names, () if seat.pipeline == 1 else given, states, seat)

    patch.setattr(ties, "_tie", tie)


def messages_are_of_the_micro_batch_before(patch):
    """What a micro-batch's forward sent is delivered to the next one."""
    real = assemble._Assembler._sent

    def sent(self, sent):
        found = real(self, sent)
        k = sent.action.microbatch
        if sent.action.kind != "F" or k == 0:
            return found
        late = tuple(name.replace(f"{k}:", f"{k - 1}:", 1) for name in found[-1].inputs)
        return [*found[:-1], replace(found[-1], inputs=late)]

    patch.setattr(assemble._Assembler, "_sent", sent)


def gradients_are_sent_of_the_micro_batch_before(patch):
    real = assemble._Assembler._sent

    def sent(self, sent):
        found = real(self, sent)
        k = sent.action.microbatch
        if sent.action.kind == "F" or k == 0:
            return found
        late = tuple(name.replace(f"{k}:", f"{k - 1}:", 1) for name in found[-1].inputs)
        return [*found[:-1], replace(found[-1], inputs=late)]

    patch.setattr(assemble._Assembler, "_sent", sent)


def without_a_task(kind, microbatch, of):
    """A stage leaves one task out."""

    def mutate(patch):
        real = assemble._Assembler._task

        def task(self, action, last):
            if (action.kind, action.microbatch, action.stage) == (kind, microbatch, of):
                return []
            return real(self, action, last)

        patch.setattr(assemble._Assembler, "_task", task)

    return mutate


def accumulators_are_assigned_twice(patch):
    """The second micro-batch begins its sums anew."""
    real = assemble._Assembler._task

    def task(self, action, last):
        if action.microbatch == 1:
            self.assigned.clear()
        return real(self, action, last)

    patch.setattr(assemble._Assembler, "_task", task)


def backwards_read_buffers_of_the_steps_start(patch):
    """What is kept for a backward is what the buffer was before the first micro-batch."""
    real = assemble._Assembler._held_buffers

    def held(self, action):
        return {name: name.split(":")[2] for name in real(self, action)}

    patch.setattr(assemble._Assembler, "_held_buffers", held)


def backwards_read_buffers_as_they_are_then(patch):
    """A backward reads what later micro-batches made of the buffer."""
    real = assemble._Assembler._outside

    def outside(self, name, k, action):
        found = real(self, name, k, action)
        after = name.replace("buffer/", "next/", 1)
        changed = found.startswith(f"{k}:{action.stage}:buffer/")
        return after if changed else found

    patch.setattr(assemble._Assembler, "_outside", outside)


def micro_batches_read_the_first_ones_buffers(patch):
    real = assemble._Assembler._outside

    def outside(self, name, k, action):
        found = real(self, name, k, action)
        return name if found.startswith("next/") else found

    patch.setattr(assemble._Assembler, "_outside", outside)


def gradients_of_another_stage_are_lost(patch):
    """A sum over uses at several stages keeps the terms of one of them only."""
    real = stage.Tasks._terms

    def terms(self, value):
        found = real(self, value)
        return {max(found): found[max(found)]}

    patch.setattr(stage.Tasks, "_terms", terms)


def sums_are_never_reduced(patch):
    """No micro-batch is taken for the last one, after which replicas reduce."""
    real = Micro.local

    def local(self, key, assigned, last):
        return real(self, key, assigned, frozenset())

    patch.setattr(Micro, "local", local)


THREE, BUFFERS, CLIPPED = "a weight at three stages", "buffers", "clipped"
MUTATIONS = {
    "tied gradients are not summed": Mutation(THREE, ONE, tied_gradients_are_not_summed),
    "tied gradients are not summed, zero": Mutation(
        THREE, f"zero2,data=2,{SPLIT}", tied_gradients_are_not_summed
    ),
    "a home brings nothing": Mutation(THREE, ONE, one_home_brings_nothing_to_the_sum),
    "terms of other stages are lost": Mutation(THREE, ONE, gradients_of_another_stage_are_lost),
    "forward of the micro-batch before": Mutation(
        THREE, ONE, messages_are_of_the_micro_batch_before, EVERYTHING
    ),
    "gradients of the micro-batch before": Mutation(
        THREE, ONE, gradients_are_sent_of_the_micro_batch_before
    ),
    "a W is left out, first stage": Mutation(THREE, SPLIT, without_a_task("W", 1, 0)),
    "a W is left out, last stage": Mutation(THREE, SPLIT, without_a_task("W", 1, 2)),
    "accumulators are assigned twice": Mutation(
        THREE, ONE, accumulators_are_assigned_twice, EVERYTHING
    ),
    "a backward reads the step's first buffers": Mutation(
        BUFFERS, ONE, backwards_read_buffers_of_the_steps_start
    ),
    "a backward reads the newest buffers": Mutation(
        BUFFERS, ONE, backwards_read_buffers_as_they_are_then
    ),
    "micro-batches read the first buffers": Mutation(
        BUFFERS, ONE, micro_batches_read_the_first_ones_buffers, EVERYTHING
    ),
    "replicas are not reduced": Mutation(CLIPPED, f"data=2,{ONE}", sums_are_never_reduced),
}


@cache
def case(name):
    return Case(STAGED[name][0]())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_fails_verification(name, monkeypatch):
    mutation = MUTATIONS[name]
    cuts = STAGED[mutation.model][1]
    plan = replace(Plan.parse(mutation.plan.format(len(cuts) + 1)), cuts=cuts)
    made = case(mutation.model)
    assert_equal(made.verify(plan, STEPS))
    mutation.patch(monkeypatch)
    report = made.verify(plan, STEPS)
    wrong = {kind for kind, worst in report.worst.items() if worst.error > 1e-6}
    assert not report.passed
    assert mutation.shows <= wrong
