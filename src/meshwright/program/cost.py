"""Cost: about how long each op of a program takes, by its arithmetic and the bytes it moves."""

from __future__ import annotations

import math

from meshwright.program.donate import VIEWS
from meshwright.program.program import Op, Program

__all__ = ["flops", "op_costs"]

_FLOPS, _BYTES = 40e9, 8e9
"""Per second, of a CPU core; what matters here is their ratio."""


def op_costs(program: Program) -> tuple[float, ...]:
    """Seconds of each op."""
    return tuple(_seconds(op, program) for op in program.ops)


def _seconds(op: Op, program: Program) -> float:
    if op.base in VIEWS:
        return 0.0
    read = op.inputs[1:] if op.base == "aten.embedding" else op.inputs  # not the whole table
    moved = sum(program.values[value].bytes for value in (*read, *op.results))
    return flops(op, program) / _FLOPS + moved / _BYTES


def flops(op: Op, program: Program) -> float:
    """Multiplications and additions of an op's products; 0 where it has none."""
    shapes = [program.values[value].shape for value in op.inputs]
    made = [program.values[value].shape for value in op.results]
    name = op.base.partition(".")[2]
    if "attention" in name:
        backward = "backward" in name  # which has the gradient of its result first
        query, key = shapes[backward], shapes[backward + 1]
        return 2.0 * (5 if backward else 2) * math.prod(query) * key[-2]
    if name == "expert_mm_weight":
        return 2.0 * math.prod(shapes[0]) * made[0][-1]
    if name.startswith("convolution"):
        weight = shapes[2] if "backward" in name else shapes[1]
        spread = shapes[0] if "backward" in name else made[0]
        times = 2 if "backward" in name else 1
        return 2.0 * times * math.prod(spread) * math.prod(weight[1:])
    if name.endswith("mm"):
        left = shapes[1] if name in ("addmm", "baddbmm") else shapes[0]
        return 2.0 * math.prod(made[0]) * left[-1]
    return 0.0
