"""Run a partitioned program op by op: slow, and each value can be looked at.

`verify` interprets all ranks in lockstep and compares every value with one device's, which names
the first op that differs; tests run random programs by it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

from torch import Tensor

from meshwright.comm.base import Group, Wait
from meshwright.compile.collective import start, unpack, wire
from meshwright.compile.lower import call
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Program

__all__ = ["interpret"]

Watcher = Callable[[int, Op, Mapping[int, Tensor]], None]


def interpret(
    program: Program,
    inputs: Mapping[str, Tensor],
    coordinates: Mapping[str, int] | None = None,
    groups: Mapping[str, Group] | None = None,
    watch: Watcher | None = None,
) -> Generator[Any, Any, dict[str, Tensor]]:
    """An exchange that runs `program` and returns its named outputs.

    Args:
        program: a rank's (or a global one, which needs no coordinates and no groups).
        inputs: tensors by input name.
        coordinates: of the rank, by axis.
        groups: of the rank, by axis.
        watch: called after each op with its number, the op and the values so far.
    """
    coordinates, groups = coordinates or {}, groups or {}
    values = {value: inputs[name] for name, value in program.inputs}
    for number, op in enumerate(program.ops):
        if op.name in COLLECTIVES:
            axis = op.args[1]
            assert isinstance(axis, str)
            operands = [values[value] for value in op.inputs]
            bucket = wire((op,))
            handle = yield start(bucket, operands, groups[axis], coordinates[axis])
            (values[op.results[0]],) = unpack(bucket, (yield Wait(handle)))
        else:
            made = call(op, values, coordinates)
            values |= {v: t for v, t in zip(op.outputs, made, strict=True) if v is not None}
        if watch is not None:
            watch(number, op, values)
    return {name: values[value] for name, value in program.outputs}
