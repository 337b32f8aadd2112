"""Fused weights: parts found from the graph, taken apart, laid out, and one tensor again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.compile.example import example_of
from meshwright.compile.init import blueprint
from meshwright.compile.interpret import interpret
from meshwright.compile.unit import trace_unit
from meshwright.plan.mesh import Axis
from meshwright.program.assemble import gather_program
from meshwright.program.block import dims_text
from meshwright.program.fused import by_part, fused_of, fused_work_layouts, part_layouts
from meshwright.program.layout import Fused, Layout, Partial, Shard, counted, local_shape, pieces
from meshwright.program.opened import opened
from meshwright.program.parts import Parts, fused_weights
from meshwright.program.program import Value
from meshwright.program.zero import zero_layouts
from meshwright.run.part import box, part_of

SAMPLES, WIDTH = 4, 8
AXES = (Axis("data", 2), Axis("tensor", 2))


class Cut(nn.Module):
    """One product, cut into parts of these widths; all but `kept` are contracted again."""

    def __init__(self, sizes, kept=()):
        super().__init__()
        self.sizes, self.kept = sizes, kept
        self.fused = nn.Linear(WIDTH, sum(sizes))
        self.out = nn.ModuleList(nn.Linear(n, WIDTH, bias=False) for n in sizes)

    def forward(self, x):
        parts = F.silu(self.fused(x)).split(self.sizes, -1)
        for k, (part, out) in enumerate(zip(parts, self.out, strict=True)):
            x = x + (out(part) if k not in self.kept else part.sum(-1, keepdim=True).tanh())
        return x


def traced(model, width=WIDTH):
    """The program of a step of a model, float64."""
    example, _ = example_of({"x": torch.zeros(SAMPLES, width)})
    made = blueprint(lambda: model, 0)

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    return trace_unit(made, loss, example, SAMPLES, dtype=torch.float64).program


def fused_in(program):
    return {name: parts for group in fused_weights(program) for name, parts in group.items()}


def ran(program, inputs):
    """Outputs of a global program."""
    exchange = interpret(program, inputs)
    with pytest.raises(StopIteration) as ended:
        exchange.send(None)
    return ended.value.value


def some(program):
    """Numbers for every input."""
    generator = torch.Generator().manual_seed(0)
    values = {name: program.values[value] for name, value in program.inputs}
    return {
        name: torch.zeros(value.shape, dtype=torch.int64)
        if value.dtype == "int64"
        else torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in values.items()
    }


def in_parts(tensors, fused, kind):
    """Named tensors with those of fused weights cut."""
    found = dict(tensors)
    for name, parts in fused.items():
        whole = found.pop(f"{kind}/{name}")
        named = zip(parts.names(f"{kind}/{name}"), whole.split(parts.sizes, parts.dim), strict=True)
        found |= dict(named)
    return found


def same_opened(program, fused):
    """Taken apart, a program makes the same numbers."""
    inputs = some(program)
    want = in_parts(ran(program, inputs), fused, "gradient")
    apart = opened(program, fused)
    got = ran(apart, in_parts(inputs, fused, "model"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)
    return apart


sizes_ = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@settings(max_examples=8, deadline=None, phases=(Phase.generate,))
@given(sizes=sizes_, turned=st.booleans())
def test_any_split_taken_apart_makes_the_same_numbers(sizes, turned):
    model = Cut(sizes)
    if turned:  # a weight whose last dim is fused
        model.fused = nn.Sequential(Turned(sum(sizes)))
    program = traced(model)
    fused = fused_in(program)
    assert (fused == {}) == (len(set(sizes)) == 1)
    assert all(parts.sizes == tuple(sizes) for parts in fused.values())
    apart = same_opened(program, fused)
    inputs = {name for name, _ in apart.inputs}
    assert inputs >= {part for n, parts in fused.items() for part in parts.names(f"model/{n}")}
    assert not inputs & {f"model/{name}" for name in fused}


class Turned(nn.Module):
    """x W, not x W^T."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, width))

    def forward(self, x):
        return x @ self.weight


def test_a_weight_whose_last_dim_is_fused_is_named_so():
    model = Cut([4, 2])
    model.fused = Turned(6)
    (group,) = fused_weights(traced(model))
    assert group == {"fused.weight": Parts(1, (4, 2))}
    assert group["fused.weight"].names("w") == ("w[:, 0:4]", "w[:, 4:6]")


class Twice(nn.Module):
    """A cut whose second part goes through a convolution of its own and is cut again."""

    def __init__(self):
        super().__init__()
        self.fused, self.out = nn.Linear(WIDTH, 37), nn.Linear(16, WIDTH)
        self.conv = nn.Conv1d(21, 21, 1, groups=21)

    def forward(self, x):
        gate, rest = self.fused(x).split([16, 21], -1)
        one, two, three = self.conv(rest.unsqueeze(-1)).squeeze(-1).split([16, 2, 3], -1)
        return x + self.out(gate * one) + (two.sum() * three.sum())


def test_cuts_of_a_part_are_cuts_of_the_whole():
    program = traced(Twice())
    (group,) = fused_weights(program)
    inner, outer = Parts(0, (16, 2, 3)), Parts(0, (16, 16, 2, 3))
    assert group == {
        "fused.weight": outer, "fused.bias": outer, "conv.weight": inner, "conv.bias": inner,
    }  # fmt: skip
    same_opened(program, group)


def test_parts_that_stay_whole_side_by_side_are_one():
    program = traced(Twice())
    layouts = fused_work_layouts(program, AXES, {})
    places = {name: layout.on("tensor") for name, layout in layouts.items()}
    half = Shard(0)
    assert places["fused.weight"] == Fused(0, ((16, half), (16, half), (5, None)))
    assert places["conv.bias"] == Fused(0, ((16, half), (5, None)))
    assert dims_text((37, WIDTH), layouts["fused.weight"]) == ("32/tensor+5", "8")
    assert str(layouts["conv.bias"]) == "fused(0: 0:16 sharded; 16:21 whole) over tensor"
    merged = fused_of(layouts)
    assert merged["conv.weight"] == Parts(0, (16, 5))
    same_opened(program, merged)


class Streamed(nn.Module):
    """What is cut is a stream that many weights add to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        left, right = x.split([3, 5], -1)
        return left.sum() + right


class Rotated(nn.Module):
    """Each head is cut inside: parts of no weight."""

    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        heads = self.query(x).unflatten(-1, (2, 6))
        turned, rest = heads[..., :2], heads[..., 2:]
        return x + self.out(torch.cat([turned.neg(), rest], -1).flatten(1))


@pytest.mark.parametrize("model", [Streamed(), Rotated()], ids=["stream", "heads"])
def test_what_is_no_fused_weight_is_left_alone(model):
    assert fused_weights(traced(model)) == []


def test_a_weight_no_part_of_which_is_split_stays_one():
    program = traced(Cut([4, 2, 2], kept=(0, 1, 2)))
    assert fused_in(program)
    assert fused_of(fused_work_layouts(program, AXES, {})) == {}


def test_what_the_user_laid_out_is_not_taken_apart():
    program = traced(Cut([4, 2, 2]))
    chosen = {"fused.bias": Layout((("tensor", Shard(0)),))}
    assert fused_of(fused_work_layouts(program, AXES, chosen)) == {}


@dataclass
class Laid:
    """A parameter under a layout of parts."""

    shape: tuple[int, ...]
    layout: Layout
    axes: tuple[Axis, ...]

    def everywhere(self):
        first, second = self.axes
        return [
            {first.name: i, second.name: k} for i in range(first.size) for k in range(second.size)
        ]


@st.composite
def laid(draw):
    """Fused over `tensor`, and perhaps another dim over `data`."""
    ranks = draw(st.integers(1, 3))
    parts = []
    for size in draw(st.lists(st.integers(3, 8), min_size=2, max_size=4)):
        unit = draw(st.sampled_from([u for u in (1, 2) if size % u == 0 and size // u >= ranks]))
        parts.append((size, draw(st.sampled_from([None, Shard(0, 1, unit)]))))
    axes = (Axis("data", 2), Axis("tensor", ranks))
    places = {"tensor": Fused(0, tuple(parts))}
    if draw(st.booleans()):
        places["data"] = Shard(1)
    return Laid((sum(n for n, _ in parts), 3), Layout.of(axes, places), axes)


@given(case=laid())
def test_boxes_of_parts_that_count_hold_each_element_once(case):
    seen = np.zeros(case.shape, int)
    for here in case.everywhere():
        held = np.zeros(local_shape(case.shape, case.layout, case.axes, here), int)
        mine = counted(case.shape, case.layout, case.axes, here)
        for there, inside in pieces(case.shape, case.layout, case.axes, here):
            held[tuple(slice(a, a + n) for a, n in inside)] += 1
            if inside in mine:
                seen[tuple(slice(a, a + n) for a, n in there)] += 1
        assert (held == 1).all()
    assert (seen == 1).all()


@settings(deadline=None)
@given(case=laid())
def test_gathered_it_is_the_whole_again(case):
    whole = torch.arange(float(np.prod(case.shape)), dtype=torch.float64).view(case.shape)
    exchanges = []
    for here in case.everywhere():
        part = part_of(whole, case.layout, case.axes, here)
        program = gather_program(
            {"w": (Value("float64", case.shape), case.layout)}, case.axes, here
        )
        groups = {axis.name: _group(case, axis, here) for axis in case.axes}
        exchanges.append(interpret(program.program, {"w": part}, here, groups))
    for outputs in run_local(exchanges):
        assert torch.equal(outputs["w"], whole)


def _group(case, axis, here):
    ranks = [
        rank
        for rank, there in enumerate(case.everywhere())
        if all(there[a.name] == here[a.name] for a in case.axes if a != axis)
    ]
    return Group(axis.name, tuple(ranks))


def test_the_state_of_parts_is_that_of_their_parameter():
    fused = Fused(0, ((32, Shard(0)), (16, None)))
    work = {"w": Layout((("tensor", fused),))}
    states = zero_layouts(3, {"w": Value("float32", (48, 32))}, AXES, work=work)
    each = by_part(states)
    heads, key = each["w[0:32]"], each["w[32:48]"]
    rests, halves = ("data", Shard(1)), ("tensor", Shard(0))
    assert states["w"].weights == Layout((rests, ("tensor", fused)))
    assert (heads.weights, heads.work) == (Layout((rests, halves)), Layout((halves,)))
    assert (key.weights, key.work) == (Layout((rests,)), Layout())
    owed = Layout((("data", Partial()), ("tensor", fused)))
    assert part_layouts(owed, Parts(0, (32, 16)))[1] == Layout((("data", Partial()),))


def test_a_rank_has_its_pieces_one_after_another():
    layout = Layout((("tensor", Fused(0, ((4, Shard(0)), (2, None), (2, Shard(0))))),))
    whole = torch.arange(8)
    found = [part_of(whole, layout, AXES, {"data": 0, "tensor": k}).tolist() for k in (0, 1)]
    assert found == [[0, 1, 4, 5, 6], [2, 3, 4, 5, 7]]
    boxes = counted((8,), layout, AXES, {"data": 0, "tensor": 1})
    mine = part_of(whole, layout, AXES, {"data": 0, "tensor": 1})
    assert [box(mine, at).tolist() for at in boxes] == [[2, 3], [7]]
    assert counted((8,), layout, AXES, {"data": 1, "tensor": 0}) == ()
