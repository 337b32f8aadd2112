"""Program -> callable: a segment becomes one generated function, which frees as it goes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from meshwright.compile.collective import local_move
from meshwright.compile.random import draw
from meshwright.program.program import Arg, Op, Program, Ref, Symbol

__all__ = ["Segment", "call", "function_of", "lower"]

Segment = Callable[..., Sequence[Tensor]]


def lower(
    program: Program, coordinates: Mapping[str, int], dtype: torch.dtype | None = None
) -> Segment:
    """A callable from the program's inputs to the tuple of its outputs, for one rank.

    Args:
        program: without collectives, local shapes.
        coordinates: the rank's, by axis: local moves and random draws read them.
        dtype: what was torch's default dtype in the trace, where ops rely on it (a tensor made
            without a dtype, integers divided); None for the one in force.
    """
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    for name, value in program.inputs:
        nodes[value] = graph.placeholder(name)
    for op in program.ops:
        function = function_of(op, coordinates)
        args, kwargs = _arguments(op, nodes)
        node = graph.call_function(function, args, kwargs)
        if not op.packed:
            nodes[op.results[0]] = node
            continue
        for place, result in enumerate(op.outputs):
            if result is not None:
                nodes[result] = graph.call_function(operator.getitem, (node, place))
    graph.output(tuple(nodes[value] for _, value in program.outputs))
    segment: Segment = fx.GraphModule({}, graph).forward
    return segment if dtype is None else partial(_with_default, segment, dtype)


def _with_default(segment: Segment, dtype: torch.dtype, *tensors: Tensor) -> Sequence[Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return segment(*tensors)
    finally:
        torch.set_default_dtype(before)


def _arguments(op: Op, nodes: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if op.name.startswith(("comm.", "meshwright.draw")):
        return tuple(nodes[value] for value in op.inputs), {}
    args = tuple(_argument(arg, nodes) for arg in op.args)
    return args, {name: _argument(arg, nodes) for name, arg in op.kwargs}


def _argument(arg: Arg, nodes: Mapping[int, Any]) -> Any:
    if isinstance(arg, Ref):
        return nodes[arg.index]
    if isinstance(arg, Symbol):
        return torch.device(arg.name) if arg.kind == "device" else getattr(torch, arg.name)
    if isinstance(arg, tuple):
        return [_argument(part, nodes) for part in arg]
    return arg


def function_of(op: Op, coordinates: Mapping[str, int]) -> Callable[..., Any]:
    """What runs `op` on the rank at `coordinates`, given its tensor operands (or all arguments)."""
    if op.name.startswith("comm."):
        return _named("move", partial(_move, op, dict(coordinates)))
    if op.base == "meshwright.draw":
        return _named("draw", partial(_draw, op, dict(coordinates)))
    namespace, name, overload = op.name.split(".")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Generated code calls functions by a name, which a partial has not."""
    function.__name__ = name
    function.__module__ = __name__
    return function


def _move(op: Op, coordinates: Mapping[str, int], tensor: Tensor) -> Tensor:
    return local_move(op, tensor, coordinates)


def _draw(op: Op, coordinates: Mapping[str, int], position: Tensor) -> Tensor:
    args: tuple[Any, ...] = op.args
    kind, size, n, dim, outer, unit, starts, _ = args
    start = sum(places[coordinates[axis]] for axis, places in starts) if starts else 0
    return draw(kind, size, n, (dim, outer, unit) if dim >= 0 else None, start, position)


def call(op: Op, values: Mapping[int, Tensor], coordinates: Mapping[str, int]) -> Sequence[Tensor]:
    """Run one op on the rank at `coordinates`; one tensor per entry of its `outputs`."""
    args, kwargs = _arguments(op, values)
    made = function_of(op, coordinates)(*args, **kwargs)
    return made if op.packed else (made,)
