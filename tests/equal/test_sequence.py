"""Sequence parallelism: what `tensor` leaves whole lies along the sequence, at as many bytes."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

import meshwright as mw
from meshwright.errors import PlanError
from meshwright.program.explain import collectives
from meshwright.run.form import first_micros
from tests.equal.cells import example
from tests.equal.families import FAMILIES as OTHERS
from tests.equal.harness import Case, assert_equal
from tests.equal.zoo_text import FAMILIES

SEQUENCE = "tensor=2,sequence=tensor"


@cache
def case(name, layers=1):
    return Case(FAMILIES[name].job(layers))


def compiled(built, plan):
    build = built.build(plan)
    return build, build.lowered(0, first_micros(build, built.data)).compiled


def moved(built, plan):
    """Collectives and bytes over `tensor`, of what is larger than a number a token."""
    build, made = compiled(built, plan)
    rows = [row for row in collectives(made, build.axes) if row.axis == "tensor"]
    count = Counter()
    for row in rows:
        if row.phase != "finish" and row.bytes // row.count > 1024:
            count[row.op, row.phase] += row.count
    return count, sum(row.bytes for row in rows)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", SEQUENCE),
        ("t5", f"zero3,data=2,{SEQUENCE},microbatches=3"),
        ("bert", f"data=2,context=2,{SEQUENCE}"),
        ("bart", "tensor=3,sequence=tensor"),
    ],
)
def test_a_family_equals_one_device(name, plan):
    assert_equal(case(name).verify(plan, steps=2))


def test_a_layer_gathers_twice_and_scatters_twice_each_way():
    one, two = (moved(case("llama", layers), SEQUENCE)[0] for layers in (1, 2))
    assert two - one == {
        (op, phase): 2
        for op in ("all_gather", "reduce_scatter")
        for phase in ("forward", "backward")
    }
    assert one == two - one + Counter(dict.fromkeys(two, 1))  # the table, and the head


def test_as_many_bytes_move_but_for_the_norms_weights():
    _, whole = moved(case("llama"), "tensor=2")
    _, along = moved(case("llama"), SEQUENCE)
    norms = sum(
        value.bytes
        for name, value in case("llama").build(SEQUENCE).values().items()
        if "norm" in name
    )
    assert along == whole + norms  # two ranks send as much as they sum


def test_between_weights_a_rank_has_its_share_of_the_sequence():
    def kept(plan):
        _, made = compiled(case("llama"), plan)
        ((_, local),) = made.units
        values = local.program.values
        made_by = {op.module: op for op in local.program.ops if op.phase == "forward"}
        return {m: values[op.results[0]].elements for m, op in made_by.items() if "norm" in m}

    whole, along = kept("tensor=2"), kept(SEQUENCE)
    assert len(whole) == 3
    assert along == {module: size // 2 for module, size in whole.items()}


def test_the_preset_is_the_plan():
    assert mw.presets.megatron(2, sequence=True) == mw.Plan.parse(SEQUENCE)


def test_without_a_tensor_axis_it_is_refused():
    with pytest.raises(PlanError, match=r"sequence=tensor, but tensor=1; use tensor=2"):
        case("llama").build("data=2,sequence=tensor")


def test_images_have_no_sequence():
    built = Case(OTHERS["vit"](4))
    with pytest.raises(PlanError, match=r"no tensor of the batch is a table .*drop sequence"):
        compiled(built, SEQUENCE)


def test_a_model_whose_heads_do_not_divide_is_equal_too():
    built = Case(example("gpt").job(depth=1, width=32, context=16, batch=8))
    assert_equal(built.verify("tensor=3,sequence=tensor", steps=2))
