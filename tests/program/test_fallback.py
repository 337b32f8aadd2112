"""Ops without a rule: what they gather, the limit, and the rule that does away with it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import meshwright as mw
from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from meshwright.program.fallback import fallbacks, require_small
from meshwright.program.rules import user
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare
from tests.equal.harness import Case, assert_equal
from tests.program.accounted import BATCH, ROWS, WIDTH, gpt, laid, scans

WHOLE = 4 * BATCH * ROWS * WIDTH


@pytest.fixture
def undeclared():
    """Rules that a test declares are gone after it."""
    before = dict(user._DECLARED)
    yield
    user._DECLARED.clear()
    user._DECLARED.update(before)


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_a_rank_receives_is_what_it_has_not(ranks):
    found = fallbacks(*laid(scans(), f"data={ranks}"))
    assert {f.module for f in found} == {"layers.0", "layers.1"}
    assert {f.op for f in found} == {"accounted::scan"}
    assert [f.bytes for f in found] == [WHOLE * (ranks - 1) // ranks] * 2
    assert all(f.source.rpartition("/")[2].startswith("accounted.py:") for f in found)
    assert [f.count for f in found] == [1, 1]


def test_each_micro_batch_gathers_its_own():
    (one, _), (two, _) = (
        fallbacks(*laid(scans(), f"data=2{more}")) for more in ("", ",microbatches=2")
    )
    assert (two.count, two.bytes) == (2, one.bytes)


def test_operands_that_are_whole_cost_nothing():
    assert [f.bytes for f in fallbacks(*laid(scans(), "tensor=2"))] == [0, 0]


def test_a_program_of_known_ops_has_none():
    assert fallbacks(*laid(gpt(), "zero3,data=2")) == ()


def test_a_limit_names_the_op_its_line_its_bytes_and_the_remedies():
    compiled, axes = laid(scans(), "data=2")
    require_small(compiled, axes, WHOLE // 2)
    with pytest.raises(PlanError) as error:
        require_small(compiled, axes, WHOLE // 2 - 1)
    text = str(error.value)
    for words in ("accounted::scan at ", "accounted.py:", " in layers.0 ", "2.0 KiB a step",
                  "(and 1 more ops like it)", "max_fallback=1", "mw.rule("):  # fmt: skip
        assert words in text


def build(text):
    plan = Plan.parse(text)
    made = prepare(scans(), plan, plan.ranks)
    return made.lowered(0, first_micros(made))


def test_the_plan_sets_the_limit_and_the_remedy_it_names_is_enough():
    with pytest.raises(PlanError, match="the plan allows 0 B") as error:
        build("data=2,max_fallback=0")
    (enough,) = re.findall(r"max_fallback=\d+", str(error.value))
    build(f"data=2,{enough}")


@pytest.mark.usefixtures("undeclared")
def test_the_rule_that_is_named_does_away_with_it_and_is_right():
    with pytest.raises(PlanError) as error:
        build("data=2,max_fallback=0")
    (words,) = re.findall(r"mw\.rule\((.*?)\) if", str(error.value))
    name, pattern, whole = re.fullmatch(r'"(.*?)", "(.*?)", whole="(.*?)"', words).groups()
    assert (name, pattern) == ("accounted::scan", "n a b, b -> n a b")
    mw.rule(name, pattern, whole=whole)
    assert fallbacks(build("data=2,max_fallback=0").compiled, ()) == ()
    job = replace(scans())
    assert_equal(Case(job).verify("data=2,microbatches=2"))
