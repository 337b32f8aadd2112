"""A case run on all its ranks in lockstep, with every request that they made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.comm.base import Group, Start
from meshwright.comm.local import run_local
from meshwright.compile.interpret import interpret
from meshwright.plan.mesh import Mesh, StageMesh
from meshwright.program.partition import COLLECTIVES, Local, partition
from meshwright.program.propagate import Completed, propagate
from tests.program.worlds import everywhere, local_parts


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """What became of a case.

    Attributes:
        completed: its layouts.
        locals: each rank's program.
        found: each rank's outputs by name.
        requests: each rank's starts of collectives, in order.
    """

    completed: Completed
    locals: list[Local]
    found: list[dict]
    requests: list[list[Start]]

    def laid(self, name):
        """The layout that an output has."""
        local = self.locals[0]
        return local.origin[local.program.output(name)][1]


def play(case):
    """Complete, partition and interpret a case."""
    completed = propagate(case.program, case.axes, *case.annotations)
    ranks = everywhere(case.axes)
    cut = [partition(case.program, completed, case.axes, at, case.delivered) for at in ranks]
    mesh = Mesh((StageMesh(case.axes),))
    parts = {
        name: local_parts(case.graph.tensors[value], layout, case.axes, value)
        for (name, value), layout in zip(case.program.inputs, completed.inputs, strict=True)
    }
    requests = [[] for _ in ranks]
    exchanges = []
    for rank, (at, local) in enumerate(zip(ranks, cut, strict=True)):
        groups = {axis.name: Group(axis.name, mesh.group(rank, axis.name)) for axis in case.axes}
        given = {name: found[rank] for name, found in parts.items()}
        run = interpret(local.program, given, at, groups, _checked(local.program))
        exchanges.append(_noted(run, requests[rank]))
    return Played(completed, cut, run_local(exchanges), requests)


def _checked(program):
    """Each value has the shape and dtype that the local program says."""

    def watch(number, op, values):
        for value in op.results:
            said, made = program.values[value], values[value]
            assert tuple(made.shape) == said.shape, (op, said.shape, made.shape)
            assert str(made.dtype) == f"torch.{said.dtype}", (op, said.dtype, made.dtype)

    return watch


def _noted(exchange, starts):
    """The exchange, each start that it yields kept in a list."""
    answer = None
    while True:
        try:
            request = exchange.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(request, Start):
            starts.append(request)
        answer = yield request


def collectives(local):
    """The ops of a rank's program that need other ranks, in order."""
    return [op for op in local.program.ops if op.name in COLLECTIVES]


def travels(start, rank):
    """Elements that a rank gives to others (of a gather: gets from them) in one request."""
    ranks = start.group.ranks
    count, mine = len(ranks), ranks.index(rank)
    sizes = [tensor.numel() for tensor in start.tensors]
    match start.op:
        case "all_reduce":
            return sum(2 * (count - 1) * size // count for size in sizes)
        case "all_gather":
            sizes = [math.prod(shape) for shape in start.shapes]
    each = len(sizes) // count
    return sum(sizes) - sum(sizes[mine * each : (mine + 1) * each])


__all__ = ["Played", "collectives", "play", "travels"]
