"""Repeat: where the layers of a model begin and end, so that equal ones become one segment.

Containers number their children, so the first number in a module's path tells which layer an op
serves: `blocks.3` of `blocks.3.mlp.up`. Ops of no module go with those before them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from meshwright.program.program import Op, Program

__all__ = ["layer_of", "repeated"]

_LAYER = re.compile(r"(.*?)(?:^|(?<=\.))(\d+)(?=\.|$)")

_LEAST = 8
"""Ops of a layer below which cutting it out costs more than it saves."""


@dataclass(slots=True)
class _Run:
    """Ops in a row of one layer, in one phase."""

    first: int
    layer: str
    ops: list[Op] = field(default_factory=list)

    @property
    def likeness(self) -> Hashable:
        """Equal for layers that are likely to be one segment."""
        kind = _LAYER.sub(r"\1*", self.layer, count=1)
        return kind, self.ops[0].phase, tuple(op.name for op in self.ops)


def repeated(program: Program) -> frozenset[int]:
    """The numbers of the ops before which a program is cut: at both ends of layers that repeat."""
    runs: list[_Run] = []
    for number, op in enumerate(program.ops):
        layer = layer_of(op) if op.module else (runs[-1].layer if runs else "")
        last = runs[-1] if runs else None
        if last is None or (last.layer, last.ops[0].phase) != (layer, op.phase):
            runs.append(_Run(number, layer))
        runs[-1].ops.append(op)
    large = [run for run in runs if run.layer and len(run.ops) >= _LEAST]
    times = Counter(run.likeness for run in large)
    cut = [run for run in large if times[run.likeness] > 1]
    return frozenset(end for run in cut for end in (run.first, run.first + len(run.ops)))


def layer_of(op: Op) -> str:
    """The layer that an op serves: its module up to the first number; empty outside of layers."""
    found = _LAYER.match(op.module)
    return found.group(0) if found else ""
