"""Text families under every kind of plan equal one device, and `tensor` truly splits them.

`make test` runs a sample in which every family, every plan and every number of micro-batches is
met; `make matrix` runs every cell.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatch
from functools import cache

import pytest

from meshwright.program.explain import collectives
from meshwright.program.layout import Fused, Shard
from meshwright.run.form import first_micros
from tests.equal.cells import MICROBATCHES
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.tables import TEXT, with_micros
from tests.equal.zoo_text import FAMILIES

SAMPLE = tuple(
    (name, TEXT.plans[number % len(TEXT.plans)], MICROBATCHES[number // 2 % 2])
    for number, name in enumerate(FAMILIES)
)
"""Each family once."""


@pytest.fixture(scope="module")
def case():
    """Family and layers -> its case; kept for the cells of one family, which follow each other."""

    @cache
    def made(name, layers=1):
        return Case(FAMILIES[name].job(layers))

    return made


def equals(case, name, plan, microbatches):
    text = with_micros(plan, microbatches)
    assert unruled(case(name), text) == set()
    report = case(name).verify(text, steps=2)
    assert_equal(report)
    return report


@pytest.mark.parametrize(("name", "plan", "microbatches"), SAMPLE)
def test_a_family_equals_one_device(case, name, plan, microbatches):
    equals(case, name, plan, microbatches)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", TEXT.cells, ids=str)
def test_every_plan_equals_one_device(case, record, cell):
    record.once(TEXT, cell, lambda: equals(case, *cell))


def test_the_sample_meets_every_plan():
    assert {name for name, _, _ in SAMPLE} == set(FAMILIES)
    assert {plan for _, plan, _ in SAMPLE} == set(TEXT.plans)
    assert {k for _, _, k in SAMPLE} == set(MICROBATCHES)


def whole_matrices(build):
    """Names of parameters of two dims or more that every rank of `tensor` holds whole."""
    split = {
        name
        for name, state in build.states.items()
        if isinstance(state.work.on("tensor"), Shard | Fused)
    }
    return {name for name, value in build.values().items() if len(value.shape) > 1} - split


def reduces(case, name, layers):
    """Collectives over `tensor` of a step, by op and phase."""
    built = case(name, layers)
    build = built.build("tensor=2")
    compiled = build.lowered(0, first_micros(build, built.data)).compiled
    found = Counter()
    for row in collectives(compiled, build.axes):
        found[row.op, row.phase] += row.count
    return found


def split_as_megatron_would(case, name):
    family = FAMILIES[name]
    build = case(name).build("tensor=2")
    allowed = {n for n in build.states if any(fnmatch(n, p) for p in family.whole)}
    assert whole_matrices(build) == {n for n in allowed if len(build.values()[n].shape) > 1}
    layer = reduces(case, name, 2) - reduces(case, name, 1)
    assert (layer["all_reduce", "forward"], layer["all_reduce", "backward"]) == family.reduces
    assert sum(layer.values()) == sum(family.reduces) + family.others


def test_llama_is_split_as_megatron_would(case):
    split_as_megatron_would(case, "llama")


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_split_as_megatron_would(case, name):
    split_as_megatron_would(case, name)


def test_keys_that_are_fewer_than_ranks_stay_whole(case):
    """Queries are split by heads all the same, and what contracts them in one way only."""
    build = case("llama").build("tensor=4")
    names = {name.rpartition("self_attn.")[2] for name in whole_matrices(build)}
    assert names == {"k_proj.weight", "v_proj.weight"}
    assert_equal(case("llama").verify("tensor=4", steps=2))
