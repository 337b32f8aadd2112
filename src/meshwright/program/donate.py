"""Donate: gradients in storages of their own, so that sums and the update may write in place.

A sum of gradients that nobody reads but its all-reduce is given up to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from meshwright.program.partition import Local
from meshwright.program.program import Op, Program, Ref

__all__ = ["VIEWS", "bases", "donated"]

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze",
        "squeeze", "slice", "select", "split", "split_with_sizes", "unbind", "alias", "detach",
        "add_",
    )
)  # fmt: skip
"""Ops whose results share their first operand's storage."""

_GRADIENT = "gradient/"


def bases(program: Program) -> dict[int, int]:
    """Value -> the value whose storage it shares, itself if it has its own."""
    base = {value: value for _, value in program.inputs}
    for op in program.ops:
        for value in op.results:
            shared = op.base in VIEWS or op.name == "comm.slice"
            base[value] = base[op.inputs[0]] if shared else value
    return base


def donated(local: Local) -> Local:
    """A unit whose gradients share no storage, and are added to the accumulators in place.

    A gradient that is part of something else (an input, a number expanded, another parameter's
    gradient) is copied.
    """
    return _given_up(_in_place(_owned(local)))


def _owned(local: Local) -> Local:
    program, base = local.program, bases(local.program)
    given = {base[value] for _, value in program.inputs}
    users = Counter(base[value] for _, value in program.outputs)
    values, ops, origin = list(program.values), list(program.ops), list(local.origin)
    outputs: list[tuple[str, int]] = []
    for name, value in program.outputs:
        own = program.values[base[value]].elements == program.values[value].elements
        if name.startswith(_GRADIENT) and not (
            own and users[base[value]] == 1 and base[value] not in given
        ):
            ops.append(
                Op("aten.clone.default", (Ref(value),), (), (len(values),), phase="backward")
            )
            outputs.append((name, len(values)))
            values.append(program.values[value])
            origin.append(origin[value])
        else:
            outputs.append((name, value))
    made = replace(program, values=tuple(values), ops=tuple(ops), outputs=tuple(outputs))
    return Local(made, tuple(origin))


def _in_place(local: Local) -> Local:
    program = local.program
    sums = {Ref(value) for name, value in program.inputs if name.startswith(_GRADIENT)}
    ops = tuple(
        # `accumulated` wrote `sum + gradient`, and nobody else reads a sum.
        replace(op, name="aten.add_.Tensor")
        if op.name == "aten.add.Tensor" and op.args[0] in sums
        else op
        for op in program.ops
    )
    return replace(local, program=replace(program, ops=ops))


def _given_up(local: Local) -> Local:
    """All-reduces are told which of their operands nobody needs any more."""
    program, base = local.program, bases(local.program)
    kept = {base[v] for n, v in program.inputs if not n.startswith(_GRADIENT)}
    kept |= {base[value] for _, value in program.outputs}
    readers = Counter(
        base[value] for op in program.ops if op.base not in VIEWS for value in op.inputs
    )

    def told(op: Op) -> Op:
        value = base[op.inputs[0]] if op.name == "comm.all_reduce" else None
        if value is None or value in kept or readers[value] > 1:
            return op
        return replace(op, kwargs=(*op.kwargs, ("donate", True)))

    return replace(local, program=replace(program, ops=tuple(told(op) for op in program.ops)))
