"""Tasks: what each stage's forward, backward and its halves do, read, give and sum."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from meshwright.comm.local import run_local
from meshwright.compile.interpret import interpret
from meshwright.program.stage import named
from tests.program.chains import chain, tasks, told

CHAINS = {
    "chain": ((0, 1, 2), False, (1, 2)),
    "tied": ((0, 1, 0), False, (1, 2)),
    "skip": ((0, 1, 2), True, (1, 2)),
    "tied and skip": ((0, 1, 0, 2, 0), True, (1, 2, 4)),
    "one weight": ((0, 0, 0, 0), False, (1, 3)),
}


def made(name, *, kept=None):
    weight, skip, layers = CHAINS[name]
    return tasks(chain(*weight, skip=skip), *layers, kept=kept)


def keys(cut, halves):
    """The tasks of a micro-batch in an order in which they can run."""
    count = cut.placement.count
    forward = [(stage, "F") for stage in range(count)]
    backward = [(stage, kind) for stage in reversed(range(count)) for kind in halves]
    return forward + backward


def tensors(program):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: program.values[value].shape for name, value in program.inputs}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def played(cut, halves):
    """The sums of a micro-batch whose tasks are run one by one, each from what others gave."""
    known = tensors(cut.whole)
    sums = Counter()
    for key in keys(cut, halves):
        task = cut.task(key)
        given = {name: known.get(name, torch.zeros(())) for name, _ in task.program.inputs}
        (found,) = run_local([interpret(task.program, given)])
        for name, tensor in found.items():
            known[name] = tensor  # accumulators included, so that all stages' terms are summed
        sums.update(task.sums)
    return known, sums


@pytest.mark.parametrize("halves", ["B", "IW"])
@pytest.mark.parametrize("kept", [None, frozenset()])
@pytest.mark.parametrize("name", CHAINS)
def test_tasks_together_are_the_whole(name, kept, halves):
    cut = made(name, kept=kept)
    (want,) = run_local([interpret(cut.whole, tensors(cut.whole))])
    found, _ = played(cut, halves)
    for output, tensor in want.items():
        torch.testing.assert_close(found[output], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_every_op_is_in_one_task_but_what_is_repeated(name):
    cut = made(name)
    counted = Counter(n for key, ops in cut.chosen.items() if key[1] in "FB" for n in ops)
    once = {n for n in cut.ops if cut.stage[n] is not None}
    assert set(counted) == once
    assert set(counted.values()) == {1}


@pytest.mark.parametrize("name", CHAINS)
def test_a_backward_is_its_two_halves(name):
    cut = made(name)
    for stage in range(cut.placement.count):
        first, second = cut.chosen[stage, "I"], cut.chosen[stage, "W"]
        assert first | second == cut.chosen[stage, "B"]
        assert not first & second


def test_the_first_half_is_what_earlier_stages_wait_for():
    cut = made("chain")
    middle = cut.task((1, "I"))
    assert told(middle.program) == ["t", "mm"]
    assert not middle.sums
    assert cut.task((1, "W")).sums == ("gradient/w1",)
    assert told(cut.task((0, "I")).program) == []  # nobody waits for the first stage


def test_what_crosses_is_one_value_each_way():
    cut = made("chain")
    for stage in (0, 1):
        forward, backward = cut.task((stage, "F")), cut.task((stage + 1, "B"))
        assert len([v for v in forward.gives if cut.crosses(v)]) == 1
        assert len([v for v in backward.gives if cut.crosses(v)]) == 1
    assert cut.task((2, "F")).gives == tuple(cut.task((2, "B")).reads[1:])
    assert not cut.task((0, "B")).gives


def test_a_skip_edge_goes_to_its_readers_alone():
    cut = made("skip")
    skipped = cut.whole.ops[0].results[0]
    assert cut.readers[skipped] == {(1, "F"), (2, "F"), (1, "W")}
    assert skipped in cut.task((2, "F")).reads
    assert skipped not in cut.task((1, "F")).gives
    (gradient,) = cut.task((2, "B")).gives  # both uses have one gradient where the paths join
    assert [cut.makers(gradient, (1, kind)) for kind in "IW"] == [((2, "B"), (2, "I"))] * 2


def test_a_reader_takes_from_the_task_that_the_schedule_has():
    cut = made("chain")
    (gradient,) = cut.task((1, "B")).gives
    assert cut.makers(gradient, (0, "B")) == ((1, "B"), (1, "I"))


def test_the_second_half_takes_gradients_from_the_first():
    cut = tasks(chain(0, 1, 2), 1)
    (kept,) = [v for v in cut.task((1, "W")).reads if cut.made[v] in cut.backward]
    assert cut.makers(kept, (1, "W")) == ((1, "I"),)
    assert kept in cut.task((1, "I")).gives
    assert kept not in cut.task((1, "B")).gives
    assert not cut.crosses(kept)


def test_a_tied_gradient_is_taken_apart():
    cut = made("tied")
    assert [sorted(cut.gradients(stage)) for stage in range(3)] == [["w0"], ["w1"], ["w0"]]
    for stage in (0, 2):
        task = cut.task((stage, "B"))
        assert task.sums == ("gradient/w0",)
        assert told(task.program).count("add") == 1  # to the accumulator, and no sum of uses
    assert not any("add" in told(cut.task((1, k)).program)[:-1] for k in "BI")


def test_uses_of_one_stage_are_summed_there():
    cut = tasks(chain(0, 1, 1, 2), 1, 3)
    assert [told(cut.task((s, "B")).program).count("add") for s in range(3)] == [1, 2, 1]


def test_sums_begin_anew_where_told():
    cut = made("chain")
    first = cut.task((1, "B"), frozenset({"gradient/w1", "gradient/w0"}))
    again = cut.task((1, "B"))
    assert told(first.program) == told(again.program)[:-1]
    assert first.sums == again.sums == ("gradient/w1",)
    names = [name for name, _ in first.program.inputs]
    assert "gradient/w1" not in names
    assert cut.task((1, "B"), frozenset({"gradient/w1"})) is first


def test_remat_keeps_what_crosses_and_makes_the_rest_again():
    weight, layers = (0, 1, 2, 3), (2,)
    plain, again = (tasks(chain(*weight), *layers, kept=k) for k in (None, frozenset()))
    first, second = plain.task((0, "F")), again.task((0, "F"))
    assert len(first.gives) == 2
    assert len(second.gives) == 1
    assert again.crosses(second.gives[0])
    extra = told(again.task((0, "B")).program)
    assert extra.count("mm") == told(plain.task((0, "B")).program).count("mm") + 1
    last = again.task((1, "B"))
    assert set(last.reads) <= set(plain.task((1, "F")).reads)


def test_values_keep_their_numbers():
    cut = made("skip")
    for key in keys(cut, "B"):
        task = cut.task(key)
        assert task.program.values is cut.whole.values
        inputs = dict(task.program.inputs)
        assert {inputs[named(v)] for v in task.reads} == set(task.reads)
        for number, op in zip(task.numbers, task.program.ops, strict=True):
            assert op.name == cut.whole.ops[number].name
            assert op.results == cut.whole.ops[number].results


def test_a_program_without_gradients_has_forwards_alone():
    program = chain(0, 1)
    forward = type(program)(program.values, program.inputs, program.ops[:3], program.outputs[:1])
    cut = tasks(forward, 1)
    assert not cut.trains
    assert set(cut.chosen) == {(0, "F"), (1, "F")}
    assert cut.task((1, "F")).sums == ("total/loss",)
