"""Convolutional networks are split over their channels, by no name: column, then row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.compile.example import example_of
from meshwright.compile.init import blueprint
from meshwright.compile.unit import trace_unit
from meshwright.plan.mesh import Axis
from meshwright.program.annotate import work_layouts
from meshwright.program.layout import Layout, Shard
from tests.program.worlds import held

TENSOR = Axis("tensor", 2)
SAMPLES, SIZE = 6, 6


def split(*layers):
    """How each parameter of a chain of layers is split over two ranks; None where it is whole."""
    batch = {"x": torch.zeros(SAMPLES, 4, SIZE, SIZE)}
    example, _ = example_of(batch)

    def loss(model, batch):
        return F.softplus(model(batch["x"])).mean()

    model = blueprint(lambda: nn.Sequential(*layers), 0)
    program = trace_unit(model, loss, example, SAMPLES).program
    found = work_layouts(program, (TENSOR,), {})
    return {name: layout.on("tensor") for name, layout in found.items()}


OUT, IN = Shard(0), Shard(1)


@pytest.mark.parametrize(
    "between",
    [(nn.ReLU(),), (nn.BatchNorm2d(8, affine=False), nn.ReLU()), (nn.MaxPool2d(2), nn.Upsample(6))],
    ids=["relu", "batch norm", "pooling"],
)
def test_a_convolution_and_the_next_one_are_column_and_row(between):
    last = str(1 + len(between))
    found = split(nn.Conv2d(4, 8, 3), *between, nn.Conv2d(8, 4, 3))
    assert found == {
        "0.weight": OUT, "0.bias": OUT, f"{last}.weight": IN, f"{last}.bias": None,
    }  # fmt: skip


def test_a_depthwise_convolution_lies_between_column_and_row():
    found = split(
        nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip
    whole = {name for name, shard in found.items() if shard is None}
    assert whole == {"6.bias", "7.weight", "7.bias"}
    assert found.pop("6.weight") == IN
    assert {shard for name, shard in found.items() if name not in whole} == {OUT}


def rows(shard, size):
    """Which of a dim's `size` rows the first of two ranks holds."""
    layout = Layout.of((TENSOR,), {"tensor": shard})
    shape = (1,) * shard.dim + (size,)
    return shard.dim, held(shape, layout, (TENSOR,), {"tensor": 0}).ravel().tolist()


def test_groups_are_split_whole():
    """Two of three groups, of four inputs and two outputs each."""
    found = split(nn.Conv2d(4, 12, 1), nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 4, 1))
    assert rows(found["0.weight"], 12) == (0, list(range(8)))
    assert rows(found["1.weight"], 6) == (0, list(range(4)))
    assert rows(found["2.weight"], 6) == (1, list(range(4)))


@pytest.mark.parametrize(("groups", "kept"), [(3, 4), (6, 3)])
def test_a_group_norm_keeps_its_groups_whole(groups, kept):
    found = split(nn.Conv2d(4, 6, 3), nn.GroupNorm(groups, 6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    assert rows(found["0.weight"], 6) == (0, list(range(kept)))
    assert rows(found["1.weight"], 6) == (0, list(range(kept)))
    assert rows(found["3.weight"], 6) == (1, list(range(kept)))


def test_a_norm_over_all_channels_splits_none():
    found = split(nn.Conv2d(4, 6, 3), nn.GroupNorm(1, 6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    assert found["0.weight"] is None
    assert found["3.weight"] == OUT  # at the end of the chain a sum takes all


def test_the_halves_of_a_gate_are_split_alike():
    found = split(nn.Conv2d(4, 16, 1), nn.GLU(1), nn.Conv2d(8, 4, 1))
    assert found["0.weight"] == Shard(0, 2, 1)
    assert found["2.weight"] == IN


def test_a_transposed_convolution_has_its_outputs_second():
    found = split(nn.ConvTranspose2d(4, 8, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3))
    assert (found["0.weight"], found["0.bias"], found["2.weight"]) == (IN, OUT, OUT)


def test_what_lies_between_takes_its_layout_from_both():
    found = split(nn.Conv2d(4, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 3))
    assert found["1.weight"] == OUT
