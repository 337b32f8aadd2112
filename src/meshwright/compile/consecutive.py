"""Indices that are written down and consecutive: `x[:, [-2]]` is a slice of `x`.

A gather's rows may be any; a slice's are known, so that axes may split around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from meshwright.program.program import Op, Program, Ref, without_dead_ops

__all__ = ["with_slices"]


def with_slices(program: Program, constants: Mapping[str, Tensor]) -> Program:
    """The program with gathers and scatters by consecutive constants as slices.

    Args:
        program: as traced.
        constants: its inputs that are, by name.
    """
    known = {value: constants[name] for name, value in program.inputs if name in constants}
    made = {value: op for op in program.ops for value in op.results}
    ops = tuple(_sliced(program, op, known, made) for op in program.ops)
    return program if ops == program.ops else without_dead_ops(replace(program, ops=ops))


def _sliced(program: Program, op: Op, known: Mapping[int, Tensor], made: Mapping[int, Op]) -> Op:
    if op.base not in ("aten.index", "aten.index_put"):
        return op
    (result,), indices = op.results, op.args[1]
    assert isinstance(indices, tuple)
    shape = program.values[op.inputs[0]].shape
    found = [(dim, index.index) for dim, index in enumerate(indices) if isinstance(index, Ref)]
    if len(found) != 1 or found[0][1] not in known:
        return op
    dim, index = found[0]
    run = _run(known[index], shape[dim])
    if run is None:
        return op
    if op.base == "aten.index":
        return replace(op, name="aten.slice.Tensor", args=(op.args[0], dim, *run))
    zeros = made.get(op.inputs[0])
    if zeros is None or zeros.base != "aten.full" or zeros.args[1] != 0:
        return op
    gradient = op.args[2]
    assert isinstance(gradient, Ref)
    if program.values[gradient.index].shape != (*shape[:dim], run[1] - run[0], *shape[dim + 1 :]):
        return op
    args = (gradient, program.values[result].shape, dim, *run, 1)
    return replace(op, name="aten.slice_backward.default", args=args, kwargs=())


def _run(index: Tensor, size: int) -> tuple[int, int] | None:
    """(start, stop) of consecutive indices into a dim of `size`; None if they are others."""
    if index.dim() != 1 or index.dtype != torch.int64 or not index.numel():
        return None
    places = [place % size for place in index.tolist()]
    start = places[0]
    return (
        (start, start + len(places)) if places == list(range(start, start + len(places))) else None
    )
