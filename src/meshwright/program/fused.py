"""Fused weights under an axis: which are taken apart, how their state lies, and together again.

Layouts of the parts are found as those of any weights are, in the program that has an input for
each (`opened`). At rest a parameter is one tensor: its pieces one after another (`Fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from meshwright.plan.mesh import Axis
from meshwright.program.annotate import work_layouts
from meshwright.program.layout import REPLICATED, Fused, Layout, Shard
from meshwright.program.opened import opened
from meshwright.program.partition import Local
from meshwright.program.parts import Parts, fused_weights
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.zero import StateLayouts

__all__ = ["Joint", "by_part", "closed", "fused_of", "fused_work_layouts", "part_layouts"]

AXIS = "tensor"
"""The axis over which annotations are found, and so the one that takes weights apart."""


def fused_work_layouts(
    program: Program, axes: Sequence[Axis], chosen: Mapping[str, Layout]
) -> dict[str, Layout]:
    """How parameters lie while they are worked with; fused ones apart where that splits a part.

    Args:
        program: of a micro-batch, with global shapes.
        axes: of the mesh.
        chosen: what the user said, by parameter.
    """
    found = any(axis.name == AXIS and axis.size > 1 for axis in axes)
    found &= all(layout.on(AXIS) is None for layout in chosen.values())
    groups = fused_weights(program, chosen) if found else []
    tried: dict[str, Parts] = {}
    while groups:
        fused = {name: parts for group in groups for name, parts in group.items()}
        layouts = work_layouts(opened(program, fused), axes, chosen)
        groups = [group for group in groups if _splits(group, layouts)]
        groups = [_merged(group, layouts) for group in groups]
        if tried == fused:
            return _together(layouts, fused)
        tried = {name: parts for group in groups for name, parts in group.items()}
        if tried == fused:
            return _together(layouts, fused)
    return work_layouts(program, axes, chosen)


def _split(layout: Layout, dim: int) -> bool:
    place = layout.on(AXIS)
    return isinstance(place, Shard) and place.dim == dim


def _splits(group: Mapping[str, Parts], layouts: Mapping[str, Layout]) -> bool:
    """Whether taking these weights apart splits any of their parts, and other axes none of them."""
    found = [(p.dim, layouts[name]) for n, p in group.items() for name in p.names(n)]
    others = any(set(dict(layout.placements)) - {AXIS} for _, layout in found)
    return not others and any(_split(layout, dim) for dim, layout in found)


def _merged(group: Mapping[str, Parts], layouts: Mapping[str, Layout]) -> dict[str, Parts]:
    """The group with parts that stay whole, and stand side by side, as one."""
    found = {}
    for name, parts in group.items():
        sizes: list[int] = []
        split = [_split(layouts[part], parts.dim) for part in parts.names(name)]
        for apart, run in groupby(zip(split, parts.sizes, strict=True), itemgetter(0)):
            each = [size for _, size in run]
            sizes += each if apart else [sum(each)]
        if len(sizes) > 1:
            found[name] = Parts(parts.dim, tuple(sizes))
    return found


def _together(layouts: Mapping[str, Layout], fused: Mapping[str, Parts]) -> dict[str, Layout]:
    """Layouts by parameter: of its parts, where they are taken apart."""
    inside = {part: name for name, parts in fused.items() for part in parts.names(name)}
    found: dict[str, Layout] = {}
    for part, layout in layouts.items():
        name = inside.get(part)
        if name is None:
            found[part] = layout
        elif name not in found:
            found[name] = _fused(name, fused[name], layouts)
    return found


def _fused(name: str, parts: Parts, layouts: Mapping[str, Layout]) -> Layout:
    each = [layouts[part] for part in parts.names(name)]
    places = [layout.on(AXIS) if _split(layout, parts.dim) else None for layout in each]
    shards = [place if isinstance(place, Shard) else None for place in places]
    return Layout(((AXIS, Fused(parts.dim, tuple(zip(parts.sizes, shards, strict=True)))),))


def fused_of(layouts: Mapping[str, Layout]) -> dict[str, Parts]:
    """The parameters that lie in parts, and which."""
    return {
        name: Parts(place.dim, place.sizes)
        for name, layout in layouts.items()
        for _, place in layout.placements
        if isinstance(place, Fused)
    }


def part_layouts(layout: Layout, parts: Parts) -> list[Layout]:
    """The layout of each part of a parameter under `layout`."""
    found = []
    for k in range(len(parts.sizes)):
        places = [
            (axis, place.parts[k][1] if isinstance(place, Fused) else place)
            for axis, place in layout.placements
        ]
        found.append(Layout(tuple((axis, place) for axis, place in places if place is not None)))
    return found


def by_part(states: Mapping[str, StateLayouts]) -> dict[str, StateLayouts]:
    """The layouts of parameters' state, those of parts too."""
    found = dict(states)
    for name, parts in fused_of({n: s.work for n, s in states.items()}).items():
        state = states[name]
        each = (state.weights, state.gradients, state.optimizer, state.work)
        four = zip(*(part_layouts(layout, parts) for layout in each), strict=True)
        found |= {
            part: StateLayouts(*layouts)
            for part, layouts in zip(parts.names(name), four, strict=True)
        }
    return found


@dataclass(frozen=True, slots=True)
class Joint:
    """A fused parameter as a rank's program takes it in one piece: its parts, and what it is."""

    parts: Parts
    value: int = -1
    layout: Layout = REPLICATED


def closed(local: Local, comes: Mapping[str, Joint], goes: Mapping[str, Joint]) -> Local:
    """A rank's program with parameters in one piece: cut where they come in, joined where they go.

    Args:
        local: of a program with parts as inputs and outputs.
        comes: the inputs that are taken in one piece, by name.
        goes: the outputs that are given in one piece.
    """
    closer = _Closer(list(local.program.values), list(local.origin))
    inputs, cuts = closer.entries(local.program.inputs, comes, closer.cut)
    outputs, joins = closer.entries(local.program.outputs, goes, closer.join)
    ops = (*cuts, *local.program.ops, *joins)
    made = Program(tuple(closer.values), inputs, ops, outputs)
    return Local(made, tuple(closer.origin))


@dataclass(slots=True)
class _Closer:
    values: list[Value]
    origin: list[tuple[int, Layout]]

    def entries(
        self,
        named: tuple[tuple[str, int], ...],
        joints: Mapping[str, Joint],
        write: Callable[[int, Sequence[int], int], list[Op]],
    ) -> tuple[tuple[tuple[str, int], ...], list[Op]]:
        """Inputs or outputs with parts as one, and the ops between."""
        known, ops = dict(named), list[Op]()
        inside = {part: name for name, joint in joints.items() for part in joint.parts.names(name)}
        found: dict[str, int] = {}
        for name, value in named:
            full = inside.get(name)
            if full is None:
                found[name] = value
            elif full not in found:
                joint = joints[full]
                each = [known[part] for part in joint.parts.names(full)]
                found[full] = self.whole(each, joint)
                ops += write(found[full], each, joint.parts.dim)
        return tuple(found.items()), ops

    def whole(self, parts: Sequence[int], joint: Joint) -> int:
        """A value for the parts side by side."""
        shape, dim = list(self.values[parts[0]].shape), joint.parts.dim
        shape[dim] = sum(self.values[part].shape[dim] for part in parts)
        self.values.append(Value(self.values[parts[0]].dtype, tuple(shape)))
        self.origin.append((joint.value, joint.layout))
        return len(self.values) - 1

    def cut(self, whole: int, parts: Sequence[int], dim: int) -> list[Op]:
        """The parts are views."""
        found, start = [], 0
        for part in parts:
            stop = start + self.values[part].shape[dim]
            found.append(Op("aten.slice.Tensor", (Ref(whole), dim, start, stop), (), (part,)))
            start = stop
        return found

    def join(self, whole: int, parts: Sequence[int], dim: int) -> list[Op]:
        """The parts are copied."""
        given = tuple(Ref(part) for part in parts)
        return [Op("aten.cat.default", (given, dim), (), (whole,), phase="backward")]
