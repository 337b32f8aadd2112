"""A block as a picture shows it."""

from __future__ import annotations

import pytest

from meshwright.program.block import block, dims_text
from meshwright.program.explain import collectives
from meshwright.program.layout import Layout, Partial, Shard
from tests.equal.cells import example
from tests.program.accounted import gpt, laid, scans, torn

MODULES = ["attn_norm", "attn.q", "attn.k", "attn.v", "attn", "attn.o", "", "mlp_norm", "mlp.up",
           "mlp", "mlp.down", ""]  # fmt: skip


@pytest.mark.parametrize("plan", ["data=2", "zero3,data=2", "tensor=2", "zero3,data=2,tensor=2"])
def test_modules_come_in_the_order_in_which_they_compute(plan):
    found = block(*laid(gpt(), plan))
    assert (found.name, found.count) == ("blocks.*", 3)
    assert [station.module for station in found.stations] == MODULES


def test_megatrons_layouts_and_its_four_all_reduces():
    found = {s.module: s for s in block(*laid(gpt(), "tensor=2")).stations if s.module}
    assert dict(found["mlp.up"].weights)["weight"] == ("256/tensor", "64")
    assert found["mlp.up"].dims == ("8", "16", "256/tensor")
    assert dict(found["mlp.down"].weights)["weight"] == ("64", "256/tensor")
    assert (found["mlp.down"].dims, found["mlp.down"].owes) == (("8", "16", "64"), ("tensor",))
    forward = [row for s in found.values() for row in s.before if not row.value]
    back = [row for s in found.values() for row in s.backward if not row.value]
    for rows in (forward, back):
        assert [(row.op, row.axis, row.exposed) for row in rows] == [
            ("all_reduce", "tensor", 1)
        ] * 2
    assert [s.module for s in found.values() if s.before] == ["attn_norm", "mlp_norm"]


def test_a_value_that_only_this_module_reads_is_not_what_it_hands_on():
    """A batch norm's last op updates its statistics; what the next module reads is its output."""
    job = example("digits").job()
    stations = {s.module: s for s in block(*laid(job, "data=2")).stations if s.module}
    assert stations["norm1"].dims == stations["conv1"].dims
    assert stations["norm1"].before[0].op == "all_reduce"


def test_state_is_moved_at_the_module_that_reads_it():
    zero3 = {s.module: s for s in block(*laid(gpt(), "zero3,data=2")).stations}
    up = zero3["mlp.up"]
    assert dict(up.weights)["weight"] == ("256/data", "64")
    assert {(r.op, r.value.split("/")[0]) for r in up.before} == {("all_gather", "model")}
    assert {(r.op, r.value.split("/")[0]) for r in up.backward if "weight" in r.value} == {
        ("all_gather", "model"), ("reduce_scatter", "gradient"),
    }  # fmt: skip
    zero1 = {s.module: s for s in block(*laid(gpt(), "zero1,data=2")).stations}
    assert {r.value for r in zero1["mlp.up"].update} >= {"model/blocks.1.mlp.up.weight"}


def test_layers_alike_add_up_to_what_the_model_moves_in_them():
    compiled, axes = laid(gpt(), "zero3,data=2")
    found = block(compiled, axes)
    one = [r for s in found.stations for r in (*s.before, *s.backward, *s.update)]
    rows = [r for r in collectives(compiled, axes) if r.module.startswith("blocks.1.")]
    assert sum(r.bytes for r in one) == sum(r.bytes for r in rows)


def test_a_model_without_layers_is_a_block_itself():
    found = block(*laid(torn(), "tensor=2"))
    assert (found.name, found.count) == ("", 1)
    assert found.stations


def test_layers_of_few_ops_are_found_too():
    found = block(*laid(scans(), "data=2"))
    assert (found.name, found.count) == ("layers.*", 2)
    assert "up" in [station.module for station in found.stations]


def test_dims_name_the_axes_that_split_them():
    layout = Layout((("data", Shard(0)), ("context", Partial()), ("tensor", Shard(0, 3, 8))))
    assert dims_text((96, 5), layout) == ("96/data/tensor", "5")
