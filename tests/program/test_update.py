"""A traced update, partitioned."""

from __future__ import annotations

import pytest
import torch
from torch import optim

from meshwright.comm.base import Group
from meshwright.comm.local import LocalWorld
from meshwright.compile.interpret import interpret
from meshwright.compile.update import Form, trace_update
from meshwright.optim import LAMB
from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Shard
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Value
from meshwright.program.update import update_program
from meshwright.run.part import part_of

SHAPE = (7, 5)  # neither dim divides by 2
AXES = (Axis("data", 2),)
ROWS = Layout((("data", Shard(0)),))
MUON = {"lr": 0.1, "momentum": 0.95}
ADAM = {"lr": 0.1, "betas.0": 0.9, "betas.1": 0.999}
KINDS = {
    "lamb": (lambda p: LAMB([p], weight_decay=0.1), ADAM, ("exp_avg", "exp_avg_sq")),
    "adafactor": (lambda p: optim.Adafactor([p]), {"lr": 0.1}, ()),
    "muon": (lambda p: optim.Muon([p]), MUON, ("momentum_buffer",)),
}


def laid(name):
    make, inputs, alike = KINDS[name]
    update = trace_update(make, Form(Value("float64", SHAPE)), inputs)
    names = ("parameter", "gradient", *(f"state/{slot}" for slot in alike))
    layouts = dict.fromkeys(names, ROWS)
    locals_ = [update_program(update.program, AXES, {"data": k}, layouts) for k in range(2)]
    return update, inputs, layouts, locals_


@pytest.mark.parametrize("name", KINDS)
def test_ranks_together_do_what_one_does(name):
    update, inputs, layouts, locals_ = laid(name)
    generator = torch.Generator().manual_seed(0)
    given = {
        n: torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        for n in ("parameter", "gradient")
    } | update.host(inputs) | update.constants  # fmt: skip
    (whole,) = LocalWorld(1).perform([interpret(update.program, given)])
    groups = {"data": Group("data", (0, 1))}
    each = [
        interpret(local.program, {n: part(t, layouts.get(n), k) for n, t in given.items()},
                  {"data": k}, groups)
        for k, local in enumerate(locals_)
    ]  # fmt: skip
    for rank, found in enumerate(LocalWorld(2).perform(each)):
        assert found.keys() == whole.keys()
        for key, tensor in found.items():
            wanted = part(whole[key], layouts.get(key), rank)
            torch.testing.assert_close(tensor, wanted, rtol=1e-13, atol=1e-13)


def part(tensor, layout, rank):
    return tensor if layout is None else part_of(tensor, layout, AXES, {"data": rank})


def moves(local):
    program = local.program
    return [
        (op.name.removeprefix("comm."), program.values[op.inputs[0]].dtype,
         program.values[op.inputs[0]].elements)
        for op in program.ops if op.name in COLLECTIVES
    ]  # fmt: skip


def test_norms_move_scalars():
    *_, (local, _) = laid("lamb")
    assert moves(local) == [("all_reduce", "float64", 1)] * 2


def test_what_is_rounded_is_gathered_as_it_is_rounded():
    *_, (first, second) = laid("muon")
    assert moves(first) == [("all_gather", "bfloat16", 20)]
    assert moves(second) == [("all_gather", "bfloat16", 15)]
    products = [op for op in first.program.ops if op.base == "aten.addmm"]
    assert {first.program.values[op.results[0]].shape for op in products} == {(5, 5), (5, 7)}
