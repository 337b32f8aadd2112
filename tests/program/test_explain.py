"""Collectives read off the instruction list: none is lost, and each is told once."""

from __future__ import annotations

import pytest

from meshwright.program.explain import collectives, sent
from meshwright.program.exposure import calls
from tests.program.accounted import gpt, laid

PLANS = [
    "data=2",
    "zero1,data=2,microbatches=3",
    "zero3,data=2",
    "tensor=2",
    "zero3,data=2,tensor=2",
]


@pytest.mark.parametrize("plan", PLANS)
def test_every_op_of_every_start_is_one_call_of_a_row(plan):
    compiled, axes = laid(gpt(), plan)
    rows = collectives(compiled, axes)
    starts = [i for i in compiled.instructions.body if i.kind == "Start"]
    ops = [op for i in starts for op in compiled.instructions.calls[i.segment]]
    assert sum(row.count for row in rows) == len(ops) == len(list(sent(compiled, axes)))
    assert {row.op for row in rows} == {op.name.removeprefix("comm.") for op in ops}
    assert [row.bytes for row in rows] == sorted((row.bytes for row in rows), reverse=True)


@pytest.mark.parametrize("plan", PLANS)
def test_exposed_calls_are_those_with_nothing_beside_them(plan):
    compiled, axes = laid(gpt(), plan)
    rows = collectives(compiled, axes)
    waited = [len(call.ops) for call in calls(compiled.instructions) if not call.beside]
    assert sum(row.exposed for row in rows) == sum(waited)
    for row in rows:
        assert 0 <= row.exposed <= row.count
        assert row.exposed_bytes <= row.bytes
        assert (row.exposed == row.count) == (row.beside == 0)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_layer_under_tensor_parallelism_is_four_all_reduces(depth):
    """Two forward, two backward (Shoeybi et al. 2019, section 3), split embedding, split head."""
    rows = collectives(*laid(gpt(depth), "tensor=2"))
    whole = 8 * 16 * 64 * 4  # a batch of activations
    layers = [row for row in rows if row.axis == "tensor" and row.bytes == whole * row.count]
    assert {row.op for row in layers} == {"all_reduce"}
    assert sum(row.count for row in layers) == 4 * depth + 2


@pytest.mark.parametrize("plan", PLANS)
def test_every_collective_names_a_line_or_the_state_it_serves(plan):
    for row in collectives(*laid(gpt(), plan)):
        assert row.source or row.value.startswith("model/"), row
        before, arrow, after = row.why.partition(" -> ")
        assert arrow, row
        assert before != after, row


def test_gradients_are_told_with_the_line_and_module_that_make_them():
    rows = collectives(*laid(gpt(), "data=2"))
    (up,) = [row for row in rows if row.value == "gradient/blocks.1.mlp.up.weight"]
    assert up.module == "blocks.1.mlp.up"
    assert "examples/gpt.py:" in up.source
    assert (up.phase, up.op, up.bytes) == ("finish", "all_reduce", 4 * 64 * 256)
