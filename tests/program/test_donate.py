"""Gradients own their storage, and sums are added to in place."""

from __future__ import annotations

import torch

from meshwright.compile.interpret import interpret
from meshwright.program.donate import bases, donated
from meshwright.program.layout import REPLICATED
from meshwright.program.partition import Local
from meshwright.program.program import Op, Program, Ref, Value


def local(ops, count, inputs, outputs):
    values = tuple(Value("float32", (2, 2)) for _ in range(count))
    program = Program(values, tuple(inputs), tuple(ops), tuple(outputs))
    return Local(program, tuple((value, REPLICATED) for value in range(count)))


def call(name, *args, result):
    return Op(f"aten.{name}", args, (), (result,))


def run(made, **inputs):
    """Its outputs, in order."""
    given = {name.replace("_", "/"): tensor for name, tensor in inputs.items()}
    try:
        next(interpret(made.program, given))
    except StopIteration as end:
        return list(end.value.values())


def names(made):
    return [op.name for op in made.program.ops]


def test_a_sum_is_added_to_in_place():
    ops = [call("mul.Tensor", Ref(0), 2.0, result=2), call("add.Tensor", Ref(1), Ref(2), result=3)]
    inputs, outputs = [("batch/x", 0), ("gradient/w", 1)], [("gradient/w", 3)]
    made = donated(local(ops, 4, inputs, outputs))
    assert names(made) == ["aten.mul.Tensor", "aten.add_.Tensor"]
    assert bases(made.program)[3] == 1
    x, total = torch.ones(2, 2), torch.full((2, 2), 5.0)
    (found,) = run(made, batch_x=x, gradient_w=total)
    assert found.data_ptr() == total.data_ptr()
    assert total.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_other_sums_stay_as_they_are():
    ops = [call("add.Tensor", Ref(0), Ref(1), result=2)]
    made = donated(local(ops, 3, [("total/loss", 0), ("batch/x", 1)], [("total/loss", 2)]))
    assert names(made) == ["aten.add.Tensor"]


def test_a_gradient_that_is_something_else_is_copied():
    """Two parameters with one gradient, an input, and a view of what another output needs."""
    ops = [call("mul.Tensor", Ref(0), 2.0, result=1), call("t.default", Ref(1), result=2)]
    outputs = [("gradient/a", 1), ("gradient/b", 2), ("gradient/c", 0)]
    made = donated(local(ops, 3, [("batch/x", 0)], outputs))
    assert names(made)[2:] == ["aten.clone.default"] * 3
    assert [value for value, _ in made.origin[3:]] == [1, 2, 0]
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = run(made, batch_x=x)
    for tensor in found:
        tensor.zero_()
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert len({tensor.data_ptr() for tensor in found}) == 3


def test_a_view_of_a_whole_storage_is_the_gradients_own():
    ops = [call("mul.Tensor", Ref(0), 2.0, result=1), call("t.default", Ref(1), result=2)]
    made = donated(local(ops, 3, [("batch/x", 0)], [("gradient/a", 2)]))
    assert names(made) == ["aten.mul.Tensor", "aten.t.default"]


def reduce(operand, result):
    return Op("comm.all_reduce", (Ref(operand), "data", "sum"), (), (result,))


def given_up(made):
    return [("donate", True) in op.kwargs for op in made.program.ops if "all_reduce" in op.name]


def test_what_only_its_reduction_reads_is_given_up():
    ops = [
        call("mul.Tensor", Ref(0), 2.0, result=1),
        call("t.default", Ref(1), result=2),
        reduce(2, 3),
    ]
    made = donated(local(ops, 4, [("batch/x", 0)], [("gradient/a", 3)]))
    assert given_up(made) == [True]


def test_a_sum_over_micro_batches_is_given_up():
    ops = [call("add.Tensor", Ref(1), Ref(0), result=2), reduce(2, 3)]
    inputs = [("batch/x", 0), ("gradient/a", 1)]
    assert given_up(donated(local(ops, 4, inputs, [("gradient/a", 3)]))) == [True]


def test_what_others_read_is_not_given_up():
    """An input, what is an output too, and what another op reads."""
    ops = [
        reduce(0, 3),
        call("mul.Tensor", Ref(0), 2.0, result=1),
        reduce(1, 4),
        call("t.default", Ref(0), result=2),
        call("mul.Tensor", Ref(0), 3.0, result=5),
        reduce(5, 6),
        call("neg.default", Ref(5), result=7),
    ]
    outputs = [("gradient/a", 3), ("gradient/b", 4), ("watch/b", 1), ("gradient/c", 6),
               ("watch/c", 7)]  # fmt: skip
    made = donated(local(ops, 8, [("batch/x", 0)], outputs))
    assert given_up(made) == [False, False, False]


def test_a_number_expanded_is_copied():
    values = (Value("float32", ()), Value("float32", ()), Value("float32", (3,)))
    ops = (
        call("mul.Tensor", Ref(0), 2.0, result=1),
        call("expand.default", Ref(1), (3,), result=2),
    )
    program = Program(values, (("batch/x", 0),), ops, (("gradient/b", 2),))
    made = donated(Local(program, tuple((value, REPLICATED) for value in range(3))))
    assert names(made)[-1] == "aten.clone.default"
