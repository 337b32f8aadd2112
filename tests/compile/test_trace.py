"""From user code to a Program: sources, modules, phases."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.compile.example import example_of
from meshwright.compile.init import blueprint
from meshwright.compile.trace import is_our_file, is_user_file, user_line
from meshwright.compile.unit import trace_unit
from tests.run.jobs import Net, mean_loss


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1  # counts
        y = x @ self.weight  # multiplies
        y.mul_(2)  # in place
        return y


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))  # squashes
        return x


def loss(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])  # compares


def traced(model=Outer, loss_=loss, width=5):
    example, _ = example_of({"x": torch.zeros(6, width), "y": torch.zeros(6, width)})
    return trace_unit(blueprint(model, 0), loss_, example, 6).program


def line(mark):
    text = inspect.getsource(inspect.getmodule(Outer)).splitlines()
    return f"{__file__}:{1 + next(k for k, t in enumerate(text) if t.endswith('# ' + mark))}"


def ops_at(program, mark):
    return [op for op in program.ops if op.source == line(mark)]


def test_every_op_knows_its_line_module_and_phase():
    program = traced()
    multiplied = ops_at(program, "multiplies")
    assert {op.module for op in multiplied} == {"layers.0", "layers.1"}
    assert {op.phase for op in multiplied} == {"forward", "backward"}
    assert {op.base for op in multiplied if op.phase == "forward"} == {"aten.mm"}
    assert {op.module for op in ops_at(program, "compares")} == {""}
    assert ops_at(program, "squashes")
    # The gradient that backward() begins with is nobody's line.
    assert {op.base for op in program.ops if not op.source.startswith(__file__)} <= {"aten.full"}


def test_writes_in_place_are_data_flow():
    program = traced()
    assert not any(op.base.endswith("_") for op in program.ops)
    assert {"next/layers.0.count", "next/layers.1.count"} <= {name for name, _ in program.outputs}
    assert {op.base for op in ops_at(program, "in place") if op.phase == "forward"} == {"aten.mul"}


def test_inputs_and_outputs_are_named():
    program = traced()
    names = {name for name, _ in program.inputs}
    assert {"model/layers.0.weight", "buffer/layers.1.count", "batch/x", "batch/y"} <= names
    outputs = {name for name, _ in program.outputs}
    assert {"gradient/layers.0.weight", "total/loss", "total/weight"} <= outputs


def test_equal_code_has_an_equal_digest():
    assert traced().digest == traced().digest
    assert traced(Net, mean_loss_, 8).digest != traced(Net, mean_loss_twice, 8).digest


class Pooled(nn.Module):
    """Pooling to one place, of channels that lie last in memory: torch restrides the result."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        places = (x * self.scale).view(6, 1, 5).expand(6, 2, 5).contiguous()
        return self.pool(places.transpose(1, 2)).flatten(1)


def test_strided_views_of_memory_in_order_are_views():
    names = [op.base for op in traced(Pooled).ops]
    assert not [name for name in names if "as_strided" in name]


def mean_loss_(model, batch):
    return mean_loss(model, {"x": batch["x"], "y": batch["y"][:, 0].long()})


def mean_loss_twice(model, batch):
    return 2 * mean_loss_(model, batch)


def test_a_program_is_plain_data():
    """Nothing of torch is left in it: it can be hashed, compared, and printed."""
    program = traced()
    assert hash(program) == hash(traced())
    assert "torch" not in {type(op).__module__.partition(".")[0] for op in program.ops}


@pytest.mark.parametrize(
    ("file", "users", "ours"),
    [
        (__file__, True, False),
        (torch.__file__, False, False),
        (nn.functional.__file__, False, False),
        (inspect.getfile(trace_unit), False, True),
        ("<string>", False, False),
    ],
)
def test_whose_a_file_is(file, users, ours):
    assert (is_user_file(file), is_our_file(file)) == (users, ours)


def test_the_nearest_line_of_the_users():
    assert user_line().startswith(f"{__file__}:")
