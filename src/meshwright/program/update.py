"""A parameter's traced update, partitioned: each rank steps its shard, norms are sums over shards.

What the step rounds to a shorter dtype than the parameter's (Muon's products in bfloat16) is made
whole on every rank: a sum in another order would be rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.plan.mesh import Axis
from meshwright.program.layout import REPLICATED, Layout
from meshwright.program.overlap import overlapped
from meshwright.program.partition import Local, partition
from meshwright.program.program import ITEMSIZE, Program
from meshwright.program.propagate import propagate

__all__ = ["update_program"]


def update_program(
    program: Program,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
    layouts: Mapping[str, Layout],
) -> Local:
    """The rank's part of an update.

    Args:
        program: of one parameter, with global shapes.
        axes: of the mesh.
        coordinates: the rank's.
        layouts: of the inputs and outputs that are not whole on every rank, by name.
    """
    pinned = {value: layouts.get(name, REPLICATED) for name, value in program.inputs}
    pinned |= dict.fromkeys(_rounded(program), REPLICATED)
    outputs = {name: layouts.get(name, REPLICATED) for name, _ in program.outputs}
    wanted = {value: outputs[name] for name, value in program.outputs if value not in pinned}
    completed = propagate(program, axes, pinned, wanted=wanted)
    local = partition(program, completed, axes, coordinates, outputs)
    return Local(overlapped(local.program), local.origin)


def _rounded(program: Program) -> frozenset[int]:
    """Values in a shorter floating dtype than the parameter's."""
    whole = ITEMSIZE[program.values[program.input("parameter")].dtype]
    return frozenset(
        result
        for op in program.ops
        for result in op.results
        if "float" in (made := program.values[result]).dtype
        and ITEMSIZE[made.dtype] < whole
        and made.shape
    )
