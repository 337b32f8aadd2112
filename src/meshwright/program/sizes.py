"""Sizes: the bytes that a rank holds of each value of a completed program, before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Partial, Placement, local_shape
from meshwright.program.program import Program, Value
from meshwright.program.propagate import Completed
from meshwright.program.rules import placed

__all__ = ["local_bytes"]


def local_bytes(
    program: Program,
    completed: Completed,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
) -> tuple[int, ...]:
    """Of each value, as it lies where it is made; a partial sum is as large as the whole.

    Args:
        program: the global one.
        completed: how.
        axes: of the mesh.
        coordinates: the rank's.
    """
    found = [value.bytes for value in program.values]

    def lies(value: int, layout: Layout) -> None:
        whole = program.values[value]
        shape = local_shape(whole.shape, layout, axes, coordinates)
        found[value] = Value(whole.dtype, shape).bytes

    for (_, value), layout in zip(program.inputs, completed.inputs, strict=True):
        lies(value, layout)
    for number, op in enumerate(program.ops):
        for place, value in enumerate(op.results):
            placements: dict[str, Placement] = {}
            for axis, carry in completed.carried[number]:
                place_ = placed(completed.rules[number], len(op.inputs) + place, axis, carry)
                placements[axis] = place_
            if op.base == "meshwright.annotate":
                placements |= {a: at[value] for a, at in completed.places.items() if value in at}
            split = {a: p for a, p in placements.items() if not isinstance(p, Partial)}
            lies(value, Layout.of(axes, split))
    return tuple(found)
