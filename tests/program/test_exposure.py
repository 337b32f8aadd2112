"""What is computed between a Start and its Wait."""

from __future__ import annotations

import pytest

from meshwright.program.exposure import calls
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.program import Op, Program, Ref, Value


def segment(*names):
    """A chain of ops."""
    ops = tuple(Op(name, (Ref(k),), (), (k + 1,)) for k, name in enumerate(names))
    values = tuple(Value("float32", (4,)) for _ in range(len(names) + 1))
    return Program(values, (("i0", 0),), ops, (("o0", len(names)),))


SEGMENTS = (
    segment("aten.gelu.default", "aten.t.default", "aten.exp.default"),
    segment("aten.t.default", "aten.view.default"),
)
CALLS = tuple((Op(f"comm.all_reduce {k}", (Ref(0), "data", "sum"), (), (1,)),) for k in range(3))


def instructions(text):
    """`S0` starts call 0, `W0` waits for it, `R1` runs segment 1, `F` frees."""
    made = []
    for word in text.split():
        kind, number = word[0], int(word[1:] or 0)
        if kind == "R":
            made.append(Instruction("Run", number, 0, 0, ("a",), ("b",)))
        elif kind == "S":
            made.append(Instruction("Start", number, 0, 0, ("a",), (f"~{number}",), "data"))
        elif kind == "W":
            made.append(Instruction("Wait", number, 0, 0, (f"~{number}",), ("b",), "data"))
        else:
            made.append(Instruction("Free", None, 0, 0, ("a",)))
    return InstructionList((), tuple(made), (), SEGMENTS, CALLS)


def beside(text):
    return {call.ops[0].name[-1]: call.beside for call in calls(instructions(text))}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("R0 S0 W0 R0", {"0": 0}),
        ("S0 R0 W0", {"0": 2}),  # the view between counts for nothing
        ("S0 R1 W0", {"0": 0}),
        ("S0 F W0", {"0": 0}),
        ("S0 R0 R1 R0 W0", {"0": 4}),
        ("S0 S1 R0 W0 W1", {"0": 2, "1": 2}),
        ("S0 S1 W0 R0 W1", {"0": 0, "1": 2}),
        ("S0 S1 S2 W2 W1 W0", {"0": 0, "1": 0, "2": 0}),
        ("R0 R1", {}),
    ],
)
def test_only_what_computes_hides_a_collective(text, found):
    assert beside(text) == found


def test_a_call_that_two_micro_batches_make_is_two():
    body = instructions("S0 R0 W0").body + instructions("S0 W0").body
    found = calls(InstructionList((), body, (), SEGMENTS, CALLS))
    assert [call.beside for call in found] == [2, 0]
