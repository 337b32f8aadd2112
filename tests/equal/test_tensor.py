"""Tensor parallelism as found from the graph: what is split, and what it costs, in counts."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from meshwright.program.explain import collectives
from meshwright.program.layout import Shard
from meshwright.run.form import first_micros
from tests.equal.cells import example
from tests.equal.families import FAMILIES
from tests.equal.harness import Case

BATCH, CONTEXT, WIDTH = 8, 16, 64
TOKENS = BATCH * CONTEXT


@cache
def gpt(depth):
    return Case(example("gpt").job(depth=depth, width=WIDTH, context=CONTEXT, batch=BATCH))


def rows(case, plan):
    build = case.build(plan, None)
    return collectives(build.lowered(0, first_micros(build, case.data)).compiled, build.axes)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_layer_takes_four_all_reduces_the_table_and_the_head_one_each(depth):
    found = rows(gpt(depth), "tensor=2")
    assert {row.op for row in found} == {"all_reduce"}
    sizes = Counter()
    for row in found:
        sizes[row.elements // row.count] += row.count
    # Of two ranks each sends and receives as much as is reduced.
    assert sizes == {TOKENS * WIDTH: 4 * depth + 2, TOKENS: 3}


def test_data_and_tensor_share_nothing():
    found = rows(gpt(1), "data=2,tensor=2")
    tensor = [row for row in found if row.axis == "tensor"]
    data = [row for row in found if row.axis == "data"]
    assert sum(row.elements for row in tensor) == 6 * TOKENS * WIDTH // 2 + 3 * TOKENS // 2
    assert {row.value.partition("/")[0] for row in data} == {"gradient", "batch"}


LLAMA = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0,
    "down_proj": 1,
}  # fmt: skip


def test_llama_is_laid_out_as_megatron_does():
    build = Case(FAMILIES["llama"]()).build("tensor=2")
    for name, states in build.states.items():
        for part, dim in LLAMA.items():
            if part in name:
                place = states.work.on("tensor")
                assert isinstance(place, Shard), name
                assert place.dim == dim, name


def test_a_fused_projection_is_split_by_heads_within_each_of_its_three():
    build = Case(FAMILIES["gpt2"]()).build("tensor=2")
    assert build.states["transformer.h.0.attn.c_attn.weight"].work.on("tensor") == Shard(1, 3, 16)
    assert build.states["transformer.wte.weight"].work.on("tensor") == Shard(0)
