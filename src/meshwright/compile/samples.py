"""Which dim of each random op counts samples, so that a sample draws the same in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from meshwright.compile.draw import SampleDim
from meshwright.plan.mesh import Axis
from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.program import Program
from meshwright.program.propagate import propagate

__all__ = ["sample_dims", "sample_layouts", "with_draws"]


def sample_layouts(program: Program) -> dict[int, Layout]:
    """The annotation that dim 0 of every batch leaf counts samples; all else is whole."""
    return {
        value: Layout((("sample", Shard(0)),)) if name.startswith("batch/") else REPLICATED
        for name, value in program.inputs
    }


def sample_dims(program: Program, samples: int, count: int) -> tuple[SampleDim | None, ...]:
    """Which dim of each random op counts samples, found by propagating the batch's."""
    found: list[SampleDim | None] = [None] * count
    if count and samples > 1:
        done = propagate(program, (Axis("sample", samples),), sample_layouts(program))
        for op in program.ops:
            if op.base == "meshwright.draw":
                place = done.places["sample"].get(op.results[0])
                n = op.args[2]
                if isinstance(place, Shard) and isinstance(n, int):
                    found[n] = (place.dim, place.outer, place.unit)
    return tuple(found)


def with_draws(program: Program, draws: Sequence[SampleDim | None]) -> Program:
    """The program whose random ops know their sample dims."""

    def known(op: Any) -> Any:
        if op.base != "meshwright.draw" or draws[op.args[2]] is None:
            return op
        return replace(op, args=(*op.args[:3], *draws[op.args[2]], *op.args[6:]))

    return replace(program, ops=tuple(known(op) for op in program.ops))
