"""Rules: every op with a rule, split every way the rule allows, computes what it does whole."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.program.layout import REPLICATED, Layout, Partial, disjoint
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Value
from meshwright.program.propagate import propagate
from meshwright.program.rules import RULES, Carry, carry_of, rule_of, shard_of
from meshwright.program.rules.shape import split_factors
from tests.program.call import program_of
from tests.program.samples import calls
from tests.program.worlds import assert_holds, axes_of, give, run_everywhere, run_global

UNSET = {"aten.empty", "aten.empty_like", "aten.new_empty"}
"""Ops whose elements are whatever memory held: shapes only."""


def test_every_rule_has_a_sample():
    assert set(RULES) == {call.base for call in calls()}


def carries(rule):
    """Every way to carry a factor, with outer and inner splits of it."""
    for factor, size in enumerate(rule.sizes):
        if factor in rule.whole or factor in {*dict(rule.halos), rule.ring}:
            continue
        yield Carry(factor)
        for part in (2, 3):
            if size % part == 0 and size > part:
                yield Carry(factor, outer=part)
                yield Carry(factor, unit=part)


def pins(program, rule, carry, axes):
    """Each single value of the op pinned as the carried factor splits it."""
    (op,) = program.ops
    inside = [
        *zip(op.inputs, rule.operands, strict=True),
        *zip(op.results, rule.results, strict=True),
    ]
    for value, dims in inside:
        shard = shard_of(rule, dims, carry)
        if shard is not None:
            yield {value: Layout.of(axes, {axes[0].name: shard})}


def tolerance(tensor):
    return 1e-5 if tensor.dtype == torch.float32 else 1e-12


def check(program, tensors, axes, pinned, expected):
    """The partitioned program computes the same, delivered whole on every rank."""
    whole = {name: REPLICATED for name, _ in program.outputs}
    found, _, programs = run_everywhere(program, axes, give(program, tensors, axes), whole, pinned)
    for name, wanted in expected.items():
        for rank in found:
            assert rank[name].shape == wanted.shape
            assert rank[name].dtype == wanted.dtype
            if program.ops[0].base not in UNSET:
                close = tolerance(wanted)
                torch.testing.assert_close(
                    rank[name], wanted, rtol=close, atol=close, equal_nan=True
                )
    return programs


every_call = pytest.mark.parametrize("call", calls(), ids=str)


def ways(program, rule):
    """(axis size, carry, pinned) for every axis size, carry and value that has the factor."""
    for size in (2, 3):
        axes = axes_of(size)
        for carry in carries(rule):
            for pinned in pins(program, rule, carry, axes):
                yield size, carry, pinned


def few(program, rule):
    """Of those, each factor once, on another value each time."""
    seen = set()
    for size, carry, pinned in reversed(list(ways(program, rule))):
        granules = rule.sizes[carry.factor] // (carry.outer * carry.unit)
        if granules >= size and (carry.factor, carry.outer > 1) not in seen:
            seen.add((carry.factor, carry.outer > 1))
            yield size, carry, pinned


def check_split(call, chosen):
    program, tensors = program_of(call)
    rule = rule_of(program.ops[0], program.values)
    assert rule.known
    expected = run_global(program, tensors)
    for size, carry, pinned in chosen(program, rule):
        axes = axes_of(size)
        if rule.sizes[carry.factor] // (carry.outer * carry.unit) >= size:
            assert propagate(program, axes, pinned).carried[0] == ((axes[0].name, carry),)
        check(program, tensors, axes, pinned, expected)


@every_call
def test_an_op_split_by_a_factor_computes_the_same(call):
    check_split(call, few)


@pytest.mark.matrix
@every_call
def test_an_op_split_by_any_factor_at_any_value_computes_the_same(call):
    check_split(call, ways)


def check_two_axes(call, step):
    program, tensors = program_of(call)
    rule = rule_of(program.ops[0], program.values)
    expected = run_global(program, tensors)
    axes = axes_of(2, 2)
    for pinned in list(pairs_of_shards(program, rule, axes))[::step]:
        check(program, tensors, axes, pinned, expected)


def pairs_of_shards(program, rule, axes):
    """All operands that have both factors split by them, for every two carries."""
    (op,) = program.ops
    for first, second in product(carries(rule), repeat=2):
        pinned = {}
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            one, two = shard_of(rule, dims, first), shard_of(rule, dims, second)
            if one is not None and two is not None and _together(rule, first, second):
                pinned[value] = Layout.of(axes, {axes[0].name: one, axes[1].name: two})
        if pinned:
            yield pinned


@pytest.mark.parametrize("call", calls()[::3], ids=str)
def test_two_axes_split_an_op_together(call):
    check_two_axes(call, 5)


@pytest.mark.matrix
@every_call
def test_any_two_axes_split_an_op_together(call):
    check_two_axes(call, 1)


def _together(rule, first, second):
    """Same factor nested, other factors, or one split inside the other's unit."""
    size = rule.sizes[first.factor]
    return first.factor != second.factor or first == second or disjoint(size, first, second)


def is_linear(call):
    program, _ = program_of(call)
    return bool(rule_of(program.ops[0], program.values).linear)


@pytest.mark.parametrize("call", [call for call in calls() if is_linear(call)], ids=str)
def test_a_sum_passes_through_what_is_linear(call):
    """Terms that sum to the operands give terms that sum to the results, with no collective."""
    program, tensors = program_of(call)
    (op,) = program.ops
    rule = rule_of(op, program.values)
    expected = run_global(program, tensors)
    axes = axes_of(3)
    for group in rule.linear:
        for places in [c for n in range(1, len(group) + 1) for c in combinations(sorted(group), n)]:
            owed = {op.inputs[place] for place in places}
            if any(program.values[value].dtype == "bool" for value in owed):
                continue
            pinned = {
                value: Layout.of(axes, {"data": Partial()}) if value in owed else REPLICATED
                for value in op.inputs
            }
            found, laid, programs = run_everywhere(
                program, axes, give(program, tensors, axes), {}, pinned
            )
            assert not any(op.name in COLLECTIVES for op in programs[0].ops)
            for name, wanted in expected.items():
                assert laid[name].on("data") == Partial()
                parts = [rank[name] for rank in found]
                assert_holds(parts, wanted, laid[name], axes, tolerance(wanted))


@every_call
def test_a_sum_is_paid_before_what_is_not_linear(call):
    program, tensors = program_of(call)
    expected = run_global(program, tensors)
    axes = axes_of(2)
    numbers = [v for v in program.ops[0].inputs if "float" in program.values[v].dtype]
    for value in numbers[:2]:
        check(program, tensors, axes, {value: Layout.of(axes, {"data": Partial()})}, expected)


def test_an_op_without_a_rule_is_computed_whole():
    values = (Value("float64", (4, 4)), Value("float64", (4, 4)))
    rule = rule_of(Op("aten.linalg_cholesky.default", (), (), (1,)), values)
    assert not rule.known
    assert list(carries(rule)) == []


# ── factors of views ─────────────────────────────────────────────────────────────────────────────


@st.composite
def views(draw):
    sizes = draw(st.lists(st.integers(1, 4), max_size=5))

    def joined():
        shape, current = [], 1
        for size in sizes:
            current *= size
            if draw(st.booleans()):
                shape.append(current)
                current = 1
        return (*shape, current) if current > 1 or not shape else tuple(shape)

    return joined(), joined()


@given(case=views())
def test_factors_of_a_view_multiply_to_its_dims_and_keep_their_order(case):
    before, after = case
    if not before or not after:
        return
    found = split_factors(before, after)
    assert found is not None
    sizes, left, right = found
    for shape, dims in ((before, left), (after, right)):
        assert all(
            not factors or math.prod(sizes[f] for f in factors) == size
            for size, factors in zip(shape, dims, strict=True)
        )
        flat = [f for factors in dims for f in factors]
        assert flat == sorted(flat)
    assert {f for dims in left for f in dims} == {f for dims in right for f in dims}


@pytest.mark.parametrize(
    ("before", "after"), [((2, 3), (5,)), ((0, 3), (3, 0)), ((4,), ()), ((2, 0), (0,))]
)
def test_what_has_other_or_no_elements_has_no_factors(before, after):
    assert split_factors(before, after) is None


def test_factors_by_example():
    assert split_factors((6, 4), (2, 3, 4)) == ((2, 3, 4), ((0, 1), (2,)), ((0,), (1,), (2,)))
    sizes, left, right = split_factors((6, 4, 5), (8, 3, 5))
    assert (left[:2], right[:2]) == (((), ()), ((), ()))
    assert sizes[left[2][0]] == 5
    assert left[2] == right[2]


def test_shards_and_carries_are_inverse():
    call = next(c for c in calls() if c.name == "aten.view.default" and c.label == "fused heads")
    program, _ = program_of(call)
    rule = rule_of(program.ops[0], program.values)
    for carry in carries(rule):
        shard = shard_of(rule, rule.operands[0], carry)
        assert carry_of(rule, rule.operands[0], shard) == carry
