"""Program -> callable: a segment becomes one generated function, which frees as it goes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from meshwright.compile import experts, ring  # noqa: F401 - register ops
from meshwright.compile.collective import local_move
from meshwright.compile.draw import draw, draw_op
from meshwright.compile.inductor import Compiled
from meshwright.compile.square import square
from meshwright.compile.window import WINDOWS, window
from meshwright.errors import UserCodeError
from meshwright.program.program import Arg, Op, Program, Ref, Symbol

__all__ = ["Segment", "call", "function_of", "lower"]

Segment = Callable[..., Sequence[Tensor]]


def lower(
    program: Program,
    coordinates: Mapping[str, int],
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
) -> Segment:
    """A callable from the program's inputs to the tuple of its outputs, for one rank.

    Args:
        program: without collectives, local shapes.
        coordinates: the rank's, by axis: local moves and random draws read them.
        dtype: what was torch's default dtype in the trace, where ops rely on it (a tensor made
            without a dtype, integers divided); None for the one in force.
        compiled: by inductor, instead of as traced.
    """
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    ops: dict[fx.Node, Op] = {}
    for name, value in program.inputs:
        nodes[value] = graph.placeholder(name)
    for op in program.ops:
        function = function_of(op, coordinates)
        args, kwargs = _arguments(op, nodes)
        node = graph.call_function(function, args, kwargs)
        ops[node] = op
        if not op.packed:
            nodes[op.results[0]] = node
            continue
        for place, result in enumerate(op.outputs):
            if result is not None:
                nodes[result] = graph.call_function(operator.getitem, (node, place))
    graph.output(tuple(nodes[value] for _, value in program.outputs))
    module = fx.GraphModule({}, graph)
    lines = _lines(module, [ops.get(node) for node in graph.nodes])
    segment: Segment = partial(_told, module.forward, lines)
    if compiled and not any(_ragged(op) for op in program.ops):
        segment = Compiled(module, segment)
    return segment if dtype is None else partial(_with_default, segment, dtype)


def _ragged(op: Op) -> bool:
    """Whether its rows are as many as come: each time others, for which nothing is compiled."""
    routed = op.base.startswith("meshwright.expert_mm") and op.args[-1] is True
    return routed or op.base == "meshwright.expert_ids"


def _with_default(segment: Segment, dtype: torch.dtype, *tensors: Tensor) -> Sequence[Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return segment(*tensors)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class _Lines:
    """Which op each line of a generated function runs."""

    code: CodeType
    ops: Mapping[int, Op]

    def failed(self, trace: TracebackType | None) -> Op | None:
        """The op at which an error's traceback left the function."""
        while trace is not None and trace.tb_frame.f_code is not self.code:
            trace = trace.tb_next
        return None if trace is None else self.ops.get(trace.tb_lineno)


def _lines(module: fx.GraphModule, ops: Sequence[Op | None]) -> _Lines:
    """Lines as torch counts them: from where the function begins, one or more per node."""
    first: int = module._prologue_start
    numbers: Mapping[int, int | None] = module._lineno_map or {}
    known = {line + first: ops[k] for line, k in numbers.items() if k is not None}
    code: CodeType = type(module).forward.__code__
    return _Lines(code, {line: op for line, op in known.items() if op is not None})


def _told(segment: Segment, lines: _Lines, *tensors: Tensor) -> Sequence[Tensor]:
    """Run; an error is told with the user's line, which the generated function has not."""
    try:
        return segment(*tensors)
    except Exception as error:
        op = lines.failed(error.__traceback__)
        if op is None:
            raise
        what = f"{op.source}: {op.base} in {op.module or 'the loss'} ({op.phase})"
        if isinstance(error, _OF_VALUES):
            raise UserCodeError(
                f"{what} raised {type(error).__name__}: {error}; check the values of the batch, "
                "such as ids and labels that are out of range"
            ) from error
        error.add_note(f"at {what}")
        raise


_OF_VALUES = (IndexError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What ops raise for values; a shape that does not fit is our mistake."""


def _arguments(op: Op, nodes: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bare = op.name.startswith(("comm.", "meshwright.draw", "meshwright.square"))
    if bare or op.base in WINDOWS:
        return tuple(nodes[value] for value in op.inputs), {}
    first = nodes[op.inputs[0]] if op.inputs else None
    args = tuple(_argument(arg, nodes, first) for arg in op.args)
    return args, {name: _argument(arg, nodes, first) for name, arg in op.kwargs}


def _argument(arg: Arg, nodes: Mapping[int, Any], first: Any) -> Any:
    if isinstance(arg, Ref):
        return nodes[arg.index]
    if isinstance(arg, Symbol) and arg.kind == "rows":
        return (
            first.graph.call_function(len, (first,)) if isinstance(first, fx.Node) else len(first)
        )
    if isinstance(arg, Symbol):
        return torch.device(arg.name) if arg.kind == "device" else getattr(torch, arg.name)
    if isinstance(arg, tuple):
        return [_argument(part, nodes, first) for part in arg]
    return arg


def function_of(op: Op, coordinates: Mapping[str, int]) -> Callable[..., Any]:
    """What runs `op` on the rank at `coordinates`, given its tensor operands (or all arguments)."""
    if op.name.startswith("comm."):
        return _named("move", partial(_move, op, dict(coordinates)))
    if op.base == "meshwright.draw":
        return _named("draw", partial(_draw, op, dict(coordinates)))
    if op.base == "meshwright.square":
        return square
    if op.base in WINDOWS:
        return _named("window", window(op, coordinates))
    if op.name == "aten.view.default":
        return torch.ops.aten.reshape.default  # a rank's part may lie in memory as no view allows
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
    if type(position) is not Tensor:  # a stand-in, while inductor traces: only an op may take it
        made: Tensor = draw_op(kind, size, n, dim, outer, unit, start, position)
        return made
    with _disable_current_modes():  # the same bits where the ops around it are promoted
        return draw(kind, size, n, (dim, outer, unit) if dim >= 0 else None, start, position)


def call(op: Op, values: Mapping[int, Tensor], coordinates: Mapping[str, int]) -> Sequence[Tensor]:
    """Run one op on the rank at `coordinates`; one tensor per entry of its `outputs`."""
    args, kwargs = _arguments(op, values)
    made = function_of(op, coordinates)(*args, **kwargs)
    return made if op.packed else (made,)
