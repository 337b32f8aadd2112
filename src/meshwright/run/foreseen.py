"""What an optimizer's step will hold and send on a rank, before any step: for `mw plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshwright.compile.scalar import evaluate
from meshwright.compile.update import Form, Update
from meshwright.program.assemble import Compiled, gather_program
from meshwright.program.explain import Row, merged, sent
from meshwright.program.instruction import InstructionList
from meshwright.program.layout import Layout, local_shape
from meshwright.program.partition import Local
from meshwright.program.pieces import Table, run_pieces
from meshwright.program.program import Value
from meshwright.program.update import update_program
from meshwright.program.zero import slot_layout
from meshwright.run.build import Build
from meshwright.run.optimizer.joint import Traces, numbers_of

__all__ = ["describe_optimizer", "joint_bytes", "update_rows"]


@dataclass(frozen=True, slots=True)
class _Steady:
    """A parameter's step once it has a state.

    Attributes:
        update: None where it is run on whole tensors.
        slots: the tensors of its state and how they lie; empty where they are not known.
    """

    name: str
    value: Value
    update: Update | None
    slots: Mapping[str, tuple[Value, Layout]]


def describe_optimizer(build: Build) -> dict[str, Any]:
    """Its class; parameters that ranks step jointly; why some are gathered for it, if any are."""
    found = () if build.traces is None else tuple(_steady(build, build.traces))
    return {
        "class": build.recipe.kind.__name__,
        "jointly": len(found),
        "gathered": sum(1 for one in found if one.update is None),
        "because": [] if build.traces is None else sorted(set(build.traces.whole.values())),
    }


def update_rows(build: Build, rank: int) -> tuple[Row, ...]:
    """The collectives of a step's update of the parameters that ranks step jointly."""
    if build.traces is None:
        return ()
    rows: list[Row] = []
    for one in _steady(build, build.traces):
        if build.holds(rank, f"model/{one.name}"):
            rows += _rows(build, rank, _local(build, rank, one))
    return merged(rows)


def joint_bytes(build: Build, rank: int) -> dict[str, int]:
    """Bytes of the optimizer's state of each parameter that is stepped jointly."""
    if build.traces is None:
        return {}
    axes, coordinates = build.axes, build.place(rank).coordinates
    found: dict[str, int] = {}
    for one in _steady(build, build.traces):
        if one.slots and build.holds(rank, f"model/{one.name}"):
            parts = (
                Value(slot.dtype, local_shape(slot.shape, layout, axes, coordinates))
                for slot, layout in one.slots.values()
            )
            found[one.name] = sum(part.bytes for part in parts)
    return found


def _steady(build: Build, traces: Traces) -> Iterator[_Steady]:
    values = build.values()
    for names, settings in build.recipe.groups:
        inputs = dict(numbers_of(settings, {}))
        for name in names:
            state = build.states[name]
            if not state.optimizer.placements:
                continue
            value = values[name]
            update = traces.of(settings, Form(value), inputs)
            slots = {} if update is None else update.slots
            lies = {s: (v, slot_layout(v, value, state, build.axes)) for s, v in slots.items()}
            if update is not None:
                update = _second(traces, settings, value, update, inputs)
            yield _Steady(name, value, None if state.optimizer.fused else update, lies)


def _second(
    traces: Traces,
    settings: Mapping[str, Any],
    value: Value,
    first: Update,
    inputs: Mapping[str, float],
) -> Update | None:
    """The step after the first."""
    after = {slot: evaluate(what, inputs) for slot, what in first.numbers.items()}
    form = Form.of(value, first.slots, after)
    return traces.of(settings, form, {**inputs, **dict(numbers_of({}, after))})


def _local(build: Build, rank: int, one: _Steady) -> Local:
    coordinates, own = build.place(rank).coordinates, build.states[one.name].optimizer
    moves = {"parameter": (one.value, own), "gradient": (one.value, own)}
    moves |= {f"state/{slot}": lies for slot, lies in one.slots.items()}
    if one.update is None:
        return gather_program(moves, build.axes, coordinates)
    layouts = {name: layout for name, (_, layout) in moves.items()}
    return update_program(one.update.program, build.axes, coordinates, layouts)


def _rows(build: Build, rank: int, local: Local) -> Iterator[Row]:
    table = Table()
    names = {name: name for name, _ in local.program.inputs}
    body = run_pieces(local.program, table, None, names, "update")
    listed = InstructionList((), body, (), tuple(table.segments), tuple(table.calls))
    compiled = Compiled(listed, (), (local,))
    for found in sent(compiled, build.lines(rank)):
        yield replace(found.row, value="the optimizer's step", phase="finish")
