"""Numbers that a trace follows."""

from __future__ import annotations

import builtins
import math

import pytest
import torch

from meshwright.compile.scalar import Expression, Known, Numbers, Read, evaluate, patched
from meshwright.errors import NotTraceable


def numbers(spare=4):
    return Numbers([torch.zeros((), dtype=torch.float64) for _ in range(spare)])


def known(table, name, value):
    return Known(table, value, Expression("input", (name,)))


def read(table, value):
    return table.read(torch.tensor(value))


EXPRESSIONS = {
    "a + 2": lambda a, b: a + 2,
    "2 - a": lambda a, b: 2 - a,
    "a * b": lambda a, b: a * b,
    "1 / a": lambda a, b: 1 / a,
    "0.9 ** b": lambda a, b: 0.9**b,
    "b % 4": lambda a, b: b % 4,
    "b // 2": lambda a, b: b // 2,
    "-a": lambda a, b: -a,
    "abs(-a)": lambda a, b: abs(-a),
    "sqrt": lambda a, b: math.sqrt(1 - 0.9**b) / (1 - a),
    "pow": lambda a, b: math.pow(a, b + 1),
    "min": lambda a, b: min(a, 0.5 / b),
    "max": lambda a, b: max(a, b, 0),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_python_computes_of_known_numbers_is_computed_again(name):
    table, compute = numbers(), EXPRESSIONS[name]
    with patched(table):
        made = compute(known(table, "a", 0.25), known(table, "b", 3))
    assert made.plain == compute(0.25, 3)
    assert evaluate(made.expression, {"a": 0.125, "b": 5}) == compute(0.125, 5)


def test_a_branch_on_known_numbers_is_a_condition():
    table = numbers()
    step = known(table, "step", 4)
    assert step % 2 == 0
    assert not step > 10
    assert bool(step)
    found = [(str(what), way) for what, way in table.conditions.items()]
    assert found == [
        ("eq(mod(step, 2), 0)", True), ("gt(step, 10)", False), ("truth(step)", True),
    ]  # fmt: skip
    right = dict(table.conditions)
    assert [evaluate(what, {"step": 5}) == way for what, way in right.items()] == [
        False, True, True,
    ]  # fmt: skip


READS = {
    "2x + 1": (lambda x: 2 * x + 1, 7.0),
    "sqrt": (lambda x: math.sqrt(x * 3), 3.0),
    "max": (lambda x: max(1.0, x), 3.0),
    "min": (lambda x: min(x, 1.0), 1.0),
    "max of a list": (lambda x: max([x, 5.0]), 5.0),
    "as Python, NaN is not larger": (lambda x: max(x, math.nan), 3.0),
    "1 / x ** 2": (lambda x: 1 / x**2, 1 / 9),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_from_a_tensor_is_followed_on_tensors(name):
    table, (compute, plain) = numbers(), READS[name]
    with patched(table):
        made = compute(read(table, 3.0))
    assert isinstance(made, Read)
    assert made.tensor.dtype == torch.float64
    assert float(made.tensor) == plain == compute(3.0)


USES = {
    "larger": lambda x: x > 1,
    "true": lambda x: 1 if x else 0,
    "equal": lambda x: x == 2,
    "int": int,
    "floor": lambda x: math.floor(x + 1),
}


@pytest.mark.parametrize("name", USES)
def test_no_branch_depends_on_it(name):
    table, use = numbers(), USES[name]
    with patched(table), pytest.raises(NotTraceable, match=r"test_scalar.py:\d+: "):
        use(read(table, 3.0))


def test_known_and_read_numbers_meet():
    table = numbers()
    made = known(table, "lr", 0.5) * read(table, 3.0)
    table.spare[0].fill_(0.5)
    assert isinstance(made, Read)
    assert [str(what) for what in table.hosts] == ["lr"]


def test_each_expression_is_one_input_and_there_are_so_many():
    table = numbers(spare=2)
    lr = known(table, "lr", 0.5)
    first, second = table.tensor(lr * 2), table.tensor(lr + 1)
    assert table.tensor(lr * 2) is first is not second
    assert [str(what) for what in table.hosts] == ["mul(lr, 2)", "add(lr, 1)"]
    with pytest.raises(NotTraceable, match="more than 2 numbers"):
        table.tensor(lr)


def test_plain_numbers_are_left_alone():
    table = numbers()
    with patched(table):
        assert (min(3, 2), max([1, 2]), max([], default=4)) == (2, 2, 4)
        assert math.sqrt(4.0) == 2.0
        assert max("ab", "b", key=len) == "ab"
    assert builtins.max is max
    assert not table.conditions
