"""Context parallelism as annotations: sequences split over the axis `context`.

Tokens of the batch are annotated on their sequence dim; the rest follows by propagation, but for
attention, where queries meet the keys of other ranks (`program.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.errors import PlanError
from meshwright.program.program import Op, Program, Ref, map_refs

__all__ = ["split_sequences"]


def split_sequences(program: Program, parts: int) -> Program:
    """The program with its batch's tokens annotated over `context`.

    Tokens are the integers of the batch with a second dim, of one length; a program with
    annotations of its own over `context` is left to them.

    Raises:
        PlanError: no leaf of the batch counts tokens, or there are too few.
    """
    if any("context" in str(op.args[1]).split(",") for op in program.ops if _annotates(op)):
        return program
    leaves = [
        (name, value)
        for name, value in program.inputs
        if name.startswith("batch/")
        and "int" in program.values[value].dtype
        and len(program.values[value].shape) > 1
    ]
    if not leaves:
        raise PlanError(
            f"plan asks for context={parts}, but no tensor of the batch is a table of integers "
            "(samples, tokens); say mw.annotate(x, None, 'context') where the model has sequences"
        )
    length = program.values[leaves[0][1]].shape[1]
    if length < parts:
        raise PlanError(
            f"plan asks for context={parts}, but sequences have {length} tokens; use "
            f"context={length} or fewer"
        )
    return _annotated(
        program, [v for _, v in leaves if program.values[v].shape[1] == length], ",context"
    )


def _annotates(op: Op) -> bool:
    return op.base == "meshwright.annotate"


def _annotated(program: Program, inputs: Sequence[int], dims: str) -> Program:
    """The program with annotations between these inputs and all that read them."""
    values = list(program.values)
    known: dict[int, int] = {}
    first: list[Op] = []
    for value in inputs:
        known[value] = len(values)
        values.append(program.values[value])
        args = (Ref(value), dims, "")
        first.append(Op("meshwright.annotate.default", args, (), (known[value],)))
    ops = [_reading(op, known) for op in program.ops]
    outputs = tuple((name, known.get(value, value)) for name, value in program.outputs)
    return replace(program, values=tuple(values), ops=(*first, *ops), outputs=outputs)


def _reading(op: Op, known: dict[int, int]) -> Op:

    args, kwargs = map_refs((op.args, op.kwargs), lambda value: known.get(value, value))
    return replace(op, args=args, kwargs=kwargs)
