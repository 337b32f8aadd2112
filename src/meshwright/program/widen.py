"""Sums over ranks are taken in float32: no reduction ever adds 16-bit terms.

What ranks owe in a short dtype is widened, reduced, and narrowed again, so that the sum is rounded
once however many ranks there are. Maxima and minima are exact as they are.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.program.program import Op, Program, Ref, Symbol, Value

__all__ = ["SHORT", "sums_short", "with_wide_sums"]

SHORT = frozenset({"bfloat16", "float16"})
"""Dtypes that no sum over ranks is taken in."""


def with_wide_sums(program: Program) -> tuple[Program, tuple[int, ...]]:
    """A rank's program with casts around each reduction of 16-bit sums.

    Returns it with, for each value added at its end, the value of which it is a copy.
    """
    values, copies, ops = list(program.values), [], []

    def wide(value: int) -> int:
        values.append(Value("float32", values[value].shape))
        copies.append(value)
        return len(values) - 1

    for op in program.ops:
        if not sums_short(op, program):
            ops.append(op)
            continue
        (term,), (total,) = op.inputs, op.results
        terms, reduced = wide(term), wide(total)
        ops.append(_cast(term, terms, "float32", op))
        ops.append(replace(op, args=(Ref(terms), *op.args[1:]), outputs=(reduced,)))
        ops.append(_cast(reduced, total, values[total].dtype, op))
    return replace(program, values=tuple(values), ops=tuple(ops)), tuple(copies)


def sums_short(op: Op, program: Program) -> bool:
    """Whether `op` adds 16-bit terms of several ranks."""
    return (
        op.name in ("comm.all_reduce", "comm.reduce_scatter")
        and op.args[-1] == "sum"
        and program.values[op.inputs[0]].dtype in SHORT
    )


def _cast(value: int, result: int, dtype: str, beside: Op) -> Op:
    kwargs = (("dtype", Symbol("dtype", dtype)),)
    return replace(
        beside, name="aten._to_copy.default", args=(Ref(value),), kwargs=kwargs, outputs=(result,)
    )
