"""Weights split by what they contract, or by the rows that are looked up in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Shard
from meshwright.program.program import Ref
from meshwright.program.propagate import propagate
from meshwright.program.rows import rows
from tests.program.graphs import Graph

BATCH, TIMES, HEADS, WIDTH = 2, 3, 4, 8


class Model(Graph):
    """A program with weights."""

    def weight(self, *shape):
        value = self.input(*shape)
        self.inputs[-1] = (f"model/w{value}", value)
        return value

    def one(self, name, *args):
        return self.call(name, *args)[0]

    def found(self, parts=2, **pinned):
        self.ops = [replace(op, phase="forward") for op in self.ops]
        program = self.program([len(self.tensors) - 1])
        axis = Axis("tensor", parts)
        return rows(program, propagate(program, (axis,), pinned), axis)

    def attend(self, query, key, value):
        """(b h, t, d) each, of whole values."""
        scores = self.one("bmm.default", Ref(query), Ref(self.one("transpose.int", Ref(key), 1, 2)))
        shares = self.one("_softmax.default", Ref(scores), -1, False)
        return self.one("bmm.default", Ref(shares), Ref(value))

    def heads_last(self, mixed):
        """(b h, t, d) -> (b t, h d)."""
        apart = self.one("view.default", Ref(mixed), (BATCH, HEADS, TIMES, WIDTH // HEADS))
        turned = self.one("transpose.int", Ref(apart), 1, 2)
        (copied,) = self.call("clone.default", Ref(turned), memory_format=torch.contiguous_format)
        return self.one("view.default", Ref(copied), (BATCH * TIMES, WIDTH))


@pytest.fixture
def model():
    return Model()


def test_a_weight_after_attention_of_whole_values_is_split_by_heads(model):
    operands = [model.input(BATCH * HEADS, TIMES, WIDTH // HEADS) for _ in range(3)]
    flat = model.heads_last(model.attend(*operands))
    weight = model.weight(5, WIDTH)
    turned = model.one("t.default", Ref(weight))
    model.one("mm.default", Ref(flat), Ref(turned))
    assert model.found() == {weight: Shard(1, 1, WIDTH // 2)}


def test_a_weight_after_nothing_that_could_be_split_is_left_whole(model):
    flat = model.one("gelu.default", Ref(model.input(BATCH * TIMES, WIDTH)))
    model.one("mm.default", Ref(flat), Ref(model.weight(WIDTH, 5)))
    assert model.found() == {}


def test_a_table_is_split_by_rows(model):
    table, index = model.weight(12, WIDTH), model.new(torch.arange(6))
    model.inputs.append(("batch/x", index))
    model.one("embedding.default", Ref(table), Ref(index))
    assert model.found() == {table: Shard(0)}


@pytest.mark.parametrize(("rows_", "parts"), [(2, 3), (2, 2)])
def test_a_table_of_few_rows_is_left_whole(model, rows_, parts):
    """Fewer than there are ranks, or many times fewer than are looked up."""
    table, index = model.weight(rows_, WIDTH), model.new(torch.arange(60) % rows_)
    model.inputs.append(("batch/x", index))
    model.one("embedding.default", Ref(table), Ref(index))
    assert model.found(parts) == {}
