"""Cuts by measured time: what is measured, what it is cut into, and that it runs."""

from __future__ import annotations

import pytest

from meshwright.errors import PlanError, UsageError
from meshwright.plan.plan import Plan
from meshwright.program.cut import at_modules, cuttable, named_places, stage_seconds
from meshwright.run import clocked as module
from meshwright.run.clocked import clocked
from tests.equal.harness import Case, assert_equal
from tests.equal.pipelines import gpt, t5, unet

TWO = Plan(data=1, pipeline=2, microbatches=2)


def slow(wanted):
    """Ops of one module take a second, others nothing to speak of."""

    def seconds(program, inputs):
        del inputs
        return tuple(1.0 if wanted(op.module) else 1e-6 for op in program.ops)

    return seconds


@pytest.mark.parametrize("make", [gpt, t5, unet])
def test_a_place_with_a_name_is_found_by_it(make):
    program, _ = module.first_unit(make(), TWO)
    places = named_places(program)
    assert set(places) <= set(cuttable(program))
    assert len(places) > len(cuttable(program)) / 2
    for place, name in places.items():
        assert at_modules(program, [name]) == (place,)


def test_all_that_is_measured_is_some_stage_s():
    program, inputs = module.first_unit(gpt(), TWO)
    seconds = module.op_seconds(program, inputs)
    assert len(seconds) == len(program.ops)
    assert min(seconds) > 0
    stages = stage_seconds(program, tuple(named_places(program))[3:5], seconds)
    assert len(stages) == 3
    assert sum(stages) == pytest.approx(sum(seconds))


def test_cuts_follow_what_is_slow(monkeypatch):
    names = []
    for block in (0, 2):
        monkeypatch.setattr(module, "op_seconds", slow(lambda at, b=block: f".{b}." in at))
        found = clocked(gpt(), TWO)
        assert sum(found.seconds) == pytest.approx(max(found.seconds) * 2, rel=0.5)
        names += found.plan.cuts
    assert names == sorted(names)
    assert names[0] != names[1]
    assert_equal(Case(gpt()).verify(found.plan, 1))


def test_a_plan_without_cuts_to_find_is_refused():
    with pytest.raises(UsageError, match=r"has no pipeline, but measuring"):
        clocked(gpt(), Plan(data=2))
    with pytest.raises(UsageError, match=r"has cuts=\['a'\], but measuring"):
        clocked(gpt(), Plan(data=1, pipeline=2, cuts=("a",)))
    with pytest.raises(PlanError, match=r"can be cut at [0-9]+ places"):
        clocked(gpt(), Plan(data=1, pipeline=90))
