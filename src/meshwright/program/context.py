"""Context parallelism as annotations: sequences split over the axis `context`.

Tokens of the batch are annotated on their sequence dim; the rest follows by propagation: queries
stay where they are, keys and values are gathered for attention. A causal flag says nothing of where
a rank's queries begin, so it becomes the mask that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from meshwright.errors import PlanError
from meshwright.program.program import Op, Program, Ref, Value, map_refs
from meshwright.program.writer import Writer

__all__ = ["split_sequences", "with_masks"]

_FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
_CAUSAL = {f"{_FLASH}": 4, f"{_FLASH}_backward": 7}
"""Where the flag stands among the arguments."""


def split_sequences(program: Program, parts: int) -> Program:
    """The program with its batch's tokens annotated over `context`, and masks in place of flags.

    Tokens are the integers of the batch with a second dim, of one length; a program with
    annotations of its own over `context` is left to them.

    Raises:
        PlanError: no leaf of the batch counts tokens, or there are too few.
    """
    program = with_masks(program)
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


def with_masks(program: Program) -> Program:
    """The program whose attention takes an explicit mask where it had a causal flag."""
    values, ops = list(program.values), []
    for op in program.ops:
        place = _CAUSAL.get(op.base)
        if place is None or len(op.args) <= place or op.args[place] is not True:
            ops.append(op)
            continue
        writer = Writer(values, op)
        mask = _mask(writer, *(values[index] for index in _query_and_key(op)))
        args = (*op.args[:place], False, *op.args[place + 1 :])
        named = {**dict(op.kwargs), "attn_mask": mask}
        ops += [*writer.ops, replace(op, args=args, kwargs=tuple(named.items()))]
    return replace(program, values=tuple(values), ops=tuple(ops))


def _query_and_key(op: Op) -> tuple[int, int]:
    first = 1 if op.base.endswith("_backward") else 0
    query, key = op.inputs[first], op.inputs[first + 1]
    return query, key


def _mask(w: Writer, query: Value, key: Value) -> Ref:
    """(queries, keys): 0 where a query sees a key, else -inf."""
    t, s = query.shape[2], key.shape[2]
    rows = w.write("aten.unsqueeze.default", (w.arange(t), 1), Value("int64", (t, 1)))
    seen = w.write("aten.ge.Tensor", (rows, w.arange(s)), Value("bool", (t, s)))
    zero, never = w.full(0.0, query.dtype), w.full(-math.inf, query.dtype)
    return w.write("aten.where.self", (seen, zero, never), Value(query.dtype, (t, s)))
