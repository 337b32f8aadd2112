"""Costs of ops, counted by hand."""

from __future__ import annotations

import pytest

from meshwright.program.cost import flops, op_costs
from meshwright.program.program import Op, Program, Ref, Value

COUNTED = {
    "aten.mm.default": ([(3, 4), (4, 5)], [(3, 5)], 2 * 3 * 4 * 5),
    "aten.addmm.default": ([(5,), (3, 4), (4, 5)], [(3, 5)], 2 * 3 * 4 * 5),
    "aten.bmm.default": ([(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], 2 * 2 * 3 * 4 * 5),
    "aten.convolution.default": ([(1, 3, 8, 8), (6, 3, 2, 2)], [(1, 6, 7, 7)], 2 * 6 * 49 * 12),
    "aten.convolution_backward.default": (
        [(1, 6, 7, 7), (1, 3, 8, 8), (6, 3, 2, 2)], [(1, 3, 8, 8), (6, 3, 2, 2)], 4 * 6 * 49 * 12),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (
        [(1, 2, 6, 4), (1, 2, 9, 4), (1, 2, 9, 4)], [(1, 2, 6, 4)], 2 * 2 * (2 * 6 * 9 * 4)),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": (
        [(1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 9, 4), (1, 2, 9, 4)], [(1, 2, 6, 4)],
        5 * 2 * (2 * 6 * 9 * 4)),
    "meshwright.expert_mm_weight.default": ([(7, 3), (7, 5)], [(2, 3, 5)], 2 * 7 * 3 * 5),
    "aten.add.Tensor": ([(3, 4), (3, 4)], [(3, 4)], 0),
}  # fmt: skip


def program(name, read, made):
    values = tuple(Value("float32", shape) for shape in (*read, *made))
    places = tuple(range(len(read)))
    op = Op(name, tuple(map(Ref, places)), (), tuple(range(len(read), len(values))))
    inputs = tuple((f"batch/{k}", k) for k in places)
    return Program(values, inputs, (op,), ())


@pytest.mark.parametrize("name", COUNTED)
def test_products_are_counted(name):
    read, made, count = COUNTED[name]
    one = program(name, read, made)
    assert flops(one.ops[0], one) == count


def test_views_cost_nothing_and_more_bytes_cost_more():
    view = program("aten.view.default", [(4, 4)], [(16,)])
    small, large = (program("aten.add.Tensor", [(n, n)] * 2, [(n, n)]) for n in (4, 40))
    assert op_costs(view) == (0.0,)
    assert 0 < op_costs(small)[0] < op_costs(large)[0]


def test_a_lookup_does_not_cost_its_whole_table():
    few, many = (
        program("aten.embedding.default", [(rows, 8), (3,)], [(3, 8)]) for rows in (4, 4000)
    )
    assert op_costs(few) == op_costs(many)
