"""The layers of traced models: what they cost, hold and send, and where a program may be cut."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from meshwright import Job
from meshwright.errors import UsageError
from meshwright.plan.plan import Plan
from meshwright.predict.machine import Level
from meshwright.predict.profile import read_profile, write_profile
from meshwright.predict.traced import measured, traced_layers
from meshwright.program.cost import op_costs
from meshwright.program.cut import cuttable
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare
from tests.program.accounted import gpt

WIDTH, ROWS = 16, 4


class Twice(nn.Module):
    """One linear that runs before and after another, whose output skips to the end."""

    def __init__(self):
        super().__init__()
        self.shared, self.middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        first = self.shared(x)
        return self.shared(self.middle(first).tanh()) + first


@cache
def twice():
    data = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3))
    job = Job(
        model=Twice,
        loss=lambda m, batch: m(batch[0]).square().mean(),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
        data=lambda: TensorDataset(data),
        batch_size=ROWS,
    )
    return program_of(job)


@cache
def program_of(job):
    build = prepare(job, Plan.parse("data=1"), 1)
    return build.unit(first_micros(build)[0]).program


def test_one_node_a_layer_in_the_order_of_the_trace():
    program = program_of(gpt())
    found = traced_layers(program, op_costs(program))
    names = [layer.name for layer in found.graph.layers]
    assert [name for name in names if name.startswith("blocks")] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    at = names.index("blocks.0")
    assert {(at, at + 1), (at + 1, at + 2)} <= set(found.graph.edges)
    assert all(maker < reader for maker, reader in found.graph.edges)


def test_weights_and_seconds_are_the_models():
    program = program_of(gpt())
    costs = op_costs(program)
    for by_module in (False, True):
        layers = traced_layers(program, costs, by_module=by_module).graph.layers
        assert sum(layer.seconds for layer in layers) == pytest.approx(sum(costs))
        end = next(n for n, op in enumerate(program.ops) if op.phase == "backward")
        assert sum(layer.forward for layer in layers) == pytest.approx(sum(costs[:end]))
    layers = {layer.name: layer for layer in traced_layers(program, costs).graph.layers}
    block = [
        program.values[value].bytes
        for name, value in program.inputs
        if name.startswith("model/blocks.1.")
    ]
    assert layers["blocks.1"].weights == sum(block)
    assert layers["blocks.0"].weights == layers["blocks.1"].weights
    assert layers["blocks.1"].backward > layers["blocks.1"].forward > 0
    assert layers["blocks.1"].seconds == pytest.approx(layers["blocks.2"].seconds)


def test_a_block_sends_its_output():
    program = program_of(gpt())
    layers = {layer.name: layer for layer in traced_layers(program, op_costs(program)).graph.layers}
    assert layers["blocks.0"].activations == 8 * 16 * 64 * 4
    assert layers["blocks.1"].activations == 8 * 16 * 64 * 4


def test_a_layer_that_runs_twice_is_two_nodes():
    program = twice()
    found = traced_layers(program, op_costs(program))
    names = [layer.name for layer in found.graph.layers]
    assert [name for name in names if "shared" in name] == ["shared", "shared#2"]
    layers = dict(zip(names, found.graph.layers, strict=True))
    assert layers["shared"].weights == layers["shared#2"].weights == (WIDTH + 1) * WIDTH * 4
    assert layers["middle"].weights == (WIDTH + 1) * WIDTH * 4
    # What skips to the end is the same value that the next layer reads: it is made once.
    assert layers["shared"].activations == ROWS * WIDTH * 4
    shared = names.index("shared")
    assert len([edge for edge in found.graph.edges if edge[0] == shared]) == 2


@pytest.mark.parametrize("by_module", [False, True])
@pytest.mark.parametrize("program", [lambda: program_of(gpt()), twice])
def test_stages_begin_where_the_program_may_be_cut(program, by_module):
    program = program()
    found = traced_layers(program, op_costs(program), by_module=by_module)
    assert set(found.begins[1:]) <= set(cuttable(program))
    assert list(found.begins) == sorted(set(found.begins))
    if by_module:
        assert found.begins[1:] == cuttable(program)
    count = len(found.begins)
    best = found.partition([Level(2, 1e9)], straight=True)
    assert [n for stage in best.stages for n in stage.layers] == list(range(count))
    assert found.positions(best) == (found.begins[best.stages[1].layers[0]],)


def test_three_stages_have_a_block_each():
    """Of a deep model whose ends are cheap."""
    program = program_of(gpt())
    found = traced_layers(program, op_costs(program))
    best = found.partition([Level(3, 1e9)], straight=True)
    names = [layer.name for layer in found.graph.layers]
    stages = [{names[n] for n in stage.layers} for stage in best.stages]
    assert [next(iter(s & {"blocks.0", "blocks.1", "blocks.2"})) for s in stages] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


def test_a_traced_profile_is_written_and_read():
    program = program_of(gpt())
    graph = traced_layers(program, op_costs(program)).graph
    assert read_profile(write_profile(graph)) == graph


def test_measured_seconds_replace_the_estimate():
    program = twice()
    found = traced_layers(program, op_costs(program))
    names = {layer.name.partition("#")[0] for layer in found.graph.layers}
    seconds = dict.fromkeys(names, (1.0, 2.0))
    timed = measured(found, seconds)
    layers = {layer.name: layer for layer in timed.graph.layers}
    assert (layers["middle"].forward, layers["middle"].backward) == (1.0, 2.0)
    assert (layers["shared"].forward, layers["shared#2"].backward) == (0.5, 1.0)
    assert timed.begins == found.begins
    before = [layer.weights for layer in found.graph.layers]
    assert [layer.weights for layer in timed.graph.layers] == before
    del seconds["middle"]
    with pytest.raises(UsageError, match="layer 'middle' has no measured seconds"):
        measured(found, seconds)
