"""Indices that are consecutive constants are slices; others stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright.compile.example import example_of
from meshwright.compile.init import blueprint
from meshwright.compile.unit import trace_unit


class Picks(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index
        self.fused = nn.Linear(5, 6)

    def forward(self, x):
        return self.fused(x)[:, self.index].square()


def loss(model, batch):
    return model(batch["x"]).mean()


def program(index):
    example, _ = example_of({"x": torch.zeros(4, 5)})
    return trace_unit(blueprint(lambda: Picks(index), 0), loss, example, 4).program


def names(index):
    return {op.base for op in program(index).ops}


@pytest.mark.parametrize(
    ("index", "run"), [([-2], (4, 5)), ([1, 2, 3], (1, 4)), ([-3, -2, -1], (3, 6))]
)
def test_consecutive_indices_are_a_slice(index, run):
    found = program(index)
    (cut,) = (op for op in found.ops if op.base == "aten.slice")
    (back,) = (op for op in found.ops if op.base == "aten.slice_backward")
    assert cut.args[1:] == (1, *run)
    assert back.args[2:] == (1, *run, 1)
    assert not {"aten.index", "aten.index_put"} & {op.base for op in found.ops}


@pytest.mark.parametrize("index", [[2, 1], [1, 3], [0, 0]])
def test_other_indices_are_gathered(index):
    assert "aten.slice" not in names(index)
    assert "aten.index" in names(index)
