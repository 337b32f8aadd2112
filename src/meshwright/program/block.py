"""A block as a picture shows it: its modules in order, their layouts, and the collectives between.

A block is a layer that repeats, the one of its kind in which most is computed; a model without one
is a block itself. A *station* is what one module computes before another module goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from meshwright.plan.mesh import Axis
from meshwright.program.assemble import Compiled
from meshwright.program.donate import bases
from meshwright.program.explain import Row, Sent, merged, sent
from meshwright.program.fold import folded, pattern_of
from meshwright.program.layout import Fused, Layout, Partial, Shard
from meshwright.program.partition import Local
from meshwright.program.program import Op, Program
from meshwright.program.repeat import layer_of

__all__ = ["Block", "Station", "block"]


@dataclass(frozen=True, slots=True)
class Station:
    """What one module of a block computes in the forward part.

    Attributes:
        module: its path within the block; empty for the block's own ops.
        ops: how many.
        source: the user's line of its last op.
        weights: (name, dims) of each parameter that it reads, as it rests.
        dims: of the last value that it hands on: `32/data`, `128`, `512/tensor`.
        owes: axes over which that value still owes a sum.
        before: collectives of the forward part that it waits for.
        backward: collectives of its backward part, and the reductions of its gradients.
        update: what gathers its weights after the update.
    """

    module: str
    ops: int
    source: str
    weights: tuple[tuple[str, tuple[str, ...]], ...]
    dims: tuple[str, ...]
    owes: tuple[str, ...]
    before: tuple[Row, ...]
    backward: tuple[Row, ...]
    update: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Block:
    """A block: `name` stands for `count` layers that are alike."""

    name: str
    count: int
    stations: tuple[Station, ...]

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        stations = [station.as_json() for station in self.stations]
        return {"name": self.name, "count": self.count, "stations": stations}


@dataclass(slots=True)
class _Draft:
    """A station that is being filled: its ops and its collectives."""

    module: str
    ops: list[Op] = field(default_factory=list)
    views: list[Op] = field(default_factory=list)  # of what its last op made
    before: list[Row] = field(default_factory=list)
    backward: list[Row] = field(default_factory=list)
    update: list[Row] = field(default_factory=list)


def block(compiled: Compiled, axes: Sequence[Axis]) -> Block:
    """The block of a step's first micro-batch, with the collectives of the last one's sums."""
    _, local = compiled.units[0]
    forward = _computing(local.program)
    layer, alike = _layer(forward)
    drafts: list[_Draft] = []
    base = bases(local.program)
    for op in forward:
        if layer and layer_of(op) != layer:
            continue
        module = op.module.removeprefix(layer).removeprefix(".")
        last = drafts[-1] if drafts else None
        if all(base[value] != value for value in op.results):
            if last is not None and last.module == module:
                last.views.append(op)
            continue
        if last is None or last.module != module:
            drafts.append(last := _Draft(module))
        last.ops.append(op)
        last.views.clear()
    _place(drafts, layer, local, list(sent(compiled, axes)))
    whole, _ = compiled.wholes[0]
    given, names = _handed_on(drafts, local.program), _weights(local.program)
    stations = tuple(_station(draft, local, whole, given, names) for draft in drafts)
    return Block(folded(alike) if layer else "", len(alike), stations)


def _computing(program: Program) -> list[Op]:
    """The forward ops that compute on what the batch brings: no moves, no views of weights."""
    state = {value for name, value in program.inputs if not name.startswith("batch/")}
    found = []
    for op in program.ops:
        if op.phase != "forward":
            continue
        if all(value in state for value in op.inputs):
            state.update(op.results)
        elif not op.name.startswith("comm."):
            found.append(op)
    return found


def _layer(forward: Iterable[Op]) -> tuple[str, list[str]]:
    """The layer to show, and all that are alike; nothing where no layer repeats."""
    ops: dict[str, list[Op]] = {}
    for op in forward:
        if name := layer_of(op):
            ops.setdefault(name, []).append(op)
    kinds = {n: (pattern_of(n), tuple(op.name for op in found)) for n, found in ops.items()}
    times = Counter(kinds.values())
    repeated = [name for name, kind in kinds.items() if times[kind] > 1]
    if not repeated:
        return "", [""]
    chosen = max(repeated, key=lambda name: (times[kinds[name]] * len(ops[name]), -len(name)))
    alike = [name for name in repeated if kinds[name] == kinds[chosen]]
    return alike[len(alike) // 2], alike  # the first one has no other before it


def _place(drafts: list[_Draft], layer: str, local: Local, calls: Sequence[Sent]) -> None:
    """Give each collective to the station that it serves."""
    program = local.program
    readers, names = program.readers(), _weights(program)
    home = {id(op): draft for draft in drafts for op in draft.ops}
    holder = {
        names[value]: draft for draft in drafts for op in draft.ops for value in op.inputs
        if value in names
    }  # fmt: skip
    for call in calls:
        op, row = call.op, call.row
        kind, _, parameter = row.value.partition("/")
        if row.phase == "finish":
            draft = holder.get(parameter)
            if draft is not None:
                (draft.backward if kind == "gradient" else draft.update).append(row)
        elif row.phase == "forward" and call.program is program:
            draft = next(
                (home[id(r)] for r in _reading(program, readers, op) if id(r) in home), None
            )
            if draft is not None:
                draft.before.append(row)
        elif row.phase == "backward" and row.module.startswith(layer):
            draft = _serving(drafts, row.module.removeprefix(layer).removeprefix("."), row.source)
            if draft is not None and (not layer or layer_of(op) == layer):
                draft.backward.append(row)


def _reading(program: Program, readers: Mapping[int, Sequence[int]], op: Op) -> Iterable[Op]:
    """The ops that read what a collective brings, further moves and views between."""
    waiting = list(op.results)
    while waiting:
        for number in readers.get(waiting.pop(0), ()):
            reader = program.ops[number]
            yield reader
            if len(reader.inputs) == 1:
                waiting += reader.results


def _serving(drafts: Sequence[_Draft], module: str, source: str) -> _Draft | None:
    """The station of a module; of several, the one with the line."""
    mine = [draft for draft in drafts if draft.module == module]
    same = [draft for draft in mine if any(op.source == source for op in draft.ops)]
    return next(iter(same or mine), None)


def _weights(program: Program) -> dict[int, str]:
    """Value -> the parameter that it is, or is a view, cast or gathered whole of."""
    names = {v: n.removeprefix("model/") for n, v in program.inputs if n.startswith("model/")}
    for op in program.ops:
        if len(op.inputs) == 1 and op.inputs[0] in names and op.phase == "forward":
            names.update(dict.fromkeys(op.results, names[op.inputs[0]]))
    return names


def _handed_on(drafts: Sequence[_Draft], program: Program) -> frozenset[int]:
    """The values that another module reads in the forward part."""
    home = {id(op): number for number, d in enumerate(drafts) for op in (*d.ops, *d.views)}
    makers = {v: home[id(op)] for d in drafts for op in (*d.ops, *d.views) for v in op.results}
    return frozenset(
        value
        for op in program.ops
        if op.phase == "forward"
        for value in op.inputs
        if value in makers and home.get(id(op)) != makers[value]
    )


def _station(
    draft: _Draft,
    local: Local,
    whole: Program,
    given: frozenset[int],
    names: Mapping[int, str],
) -> Station:
    """The station of a draft; `given` are values handed on, `names` those that are weights."""
    program = local.program
    inputs = {n.removeprefix("model/"): v for n, v in program.inputs if n.startswith("model/")}
    read = dict.fromkeys(names[v] for op in draft.ops for v in op.inputs if v in names)
    made = [value for op in (*draft.ops, *draft.views) for value in op.results]
    dims, owes = _lies(local, whole, [*made[-1:], *(v for v in made if v in given)][-1])
    return Station(
        module=draft.module,
        ops=len(draft.ops),
        source=draft.ops[-1].source,
        weights=tuple((n.rpartition(".")[2], _lies(local, whole, inputs[n])[0]) for n in read),
        dims=dims,
        owes=owes,
        before=merged(draft.before),
        backward=merged(draft.backward),
        update=merged(draft.update),
    )


def _lies(local: Local, whole: Program, value: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A local value's global dims with the axes that split each, and the axes that owe a sum."""
    number, layout = local.origin[value]
    return dims_text(whole.values[number].shape, layout), tuple(
        axis for axis, place in layout.placements if isinstance(place, Partial)
    )


def dims_text(shape: tuple[int, ...], layout: Layout) -> tuple[str, ...]:
    """Each dim with the axes that split it: `32/data`, `128`, `512/tensor`, `32/tensor+16`."""
    return tuple(_dim_text(dim, size, layout) for dim, size in enumerate(shape))


def _dim_text(dim: int, size: int, layout: Layout) -> str:
    axes: list[str] = []
    for axis, place in layout.placements:
        if isinstance(place, Fused) and place.dim == dim:
            split = sum(part for part, shard in place.parts if shard is not None)
            return f"{split}/{axis}" + f"+{size - split}" * (split < size)
        if isinstance(place, Shard) and place.dim == dim:
            axes.append(axis)
    return "/".join([str(size), *axes])
