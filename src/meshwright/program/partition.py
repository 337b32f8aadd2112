"""Partition: one rank's program, with local shapes and the reshards that layouts ask for.

Every op runs on shards where the completed layouts let it; an operand that lies otherwise is
brought over by the cheapest steps (`reshard`). A *partial* value passes through ops that are linear
in it and is paid for as late as possible, so that gradients owe one reduction, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.plan.mesh import SAMPLE_AXES, Axis
from meshwright.program.halo import Spans, Spreader, spans
from meshwright.program.layout import Layout, Partial, Placement, Shard, local_shape, slab
from meshwright.program.owed import paid_where_made
from meshwright.program.program import Arg, Op, Program, Ref, Value, map_refs
from meshwright.program.propagate import Completed
from meshwright.program.reshard import Step, reshard
from meshwright.program.ring import Ring
from meshwright.program.rules import Carry, Rule, placed, shard_of
from meshwright.program.rules.factor import Halo
from meshwright.program.widen import with_wide_sums

__all__ = ["COLLECTIVES", "Local", "partition"]

COLLECTIVES = frozenset(
    f"comm.{name}"
    for name in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "permute", "exchange")
)
"""Ops of a partitioned program that need other ranks; `comm.slice` and `comm.mask` do not.

The first operand is what travels; an exchange has two more, how many rows go to each rank and come
from each, which are known when it starts.
"""


@dataclass(frozen=True, slots=True)
class Local:
    """A rank's program and, per local value, the global value and layout that it is a part of."""

    program: Program
    origin: tuple[tuple[int, Layout], ...]  # of value -1 where it is a part of none


def partition(
    program: Program,
    completed: Completed,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
    outputs: Mapping[str, Layout],
) -> Local:
    """The program of the rank at `coordinates`.

    Args:
        program: the global one.
        completed: its rules, carried factors and input layouts.
        axes: of the mesh, major first.
        coordinates: the rank's, by axis.
        outputs: output name -> the layout to deliver; those not named stay as they come.
    """
    writer = _Writer(program, completed, axes, coordinates)
    writer.early = paid_where_made(program, completed, axes, outputs)
    inputs = tuple(
        (name, writer.new(value, layout))
        for (name, value), layout in zip(program.inputs, completed.inputs, strict=True)
    )
    for number, op in enumerate(program.ops):
        writer.op(number, op)
    finish = Op("", (), phase="finish")
    delivered = tuple(
        (name, writer.bring(value, outputs.get(name, writer.lies[value]), finish, name))
        for name, value in program.outputs
    )
    local = Program(tuple(writer.values), inputs, tuple(writer.ops), delivered)
    local, copies = with_wide_sums(local)
    return Local(local, (*writer.origin, *(writer.origin[value] for value in copies)))


class _Writer:
    """Writes the local program op by op."""

    def __init__(
        self,
        program: Program,
        completed: Completed,
        axes: Sequence[Axis],
        coordinates: Mapping[str, int],
    ) -> None:
        self.program = program
        self.completed = completed
        self.axes = axes
        self.sizes = {axis.name: axis.size for axis in axes}
        self.coordinates = coordinates
        self.values: list[Value] = []
        self.origin: list[tuple[int, Layout]] = []
        self.ops: list[Op] = []
        self.lies: dict[int, Layout] = {}
        self.first: dict[int, Layout] = {}  # as they are made
        self.made: dict[tuple[int, Layout, tuple[str, str] | None], int] = {}
        self.names = {number: name for name, number in program.inputs}
        self.producers = program.producers()
        # What was exchanged is dense; a view that was one of the whole may need a copy then.
        self.restrides = any(a.size > 1 and a.name not in SAMPLE_AXES for a in axes)
        self.early: Mapping[str, frozenset[int]] = {}
        self.read: dict[tuple[int, Spans, int, float], int] = {}

    def new(self, value: int, layout: Layout, scope: tuple[str, str] | None = None) -> int:
        """A local value for the global one under `layout`; the first is where the value lies."""
        old = self.program.values[value]
        shape = local_shape(old.shape, layout, self.axes, self.coordinates)
        self.values.append(Value(old.dtype, shape))
        self.origin.append((value, layout))
        self.lies.setdefault(value, layout)
        self.first.setdefault(value, layout)
        self.made[value, layout, scope] = len(self.values) - 1
        return len(self.values) - 1

    def bring(self, value: int, layout: Layout, reader: Op, label: str = "") -> int:
        """The local value that holds `value` under `layout`, resharded if need be.

        What is brought is kept for later readers; a stored weight's only within the same module
        and phase, so that ZeRO-3 never saves gathered weights from forward to backward.
        """
        here = self.lies[value]
        scope = None
        if value in self.completed.resting and layout != here:
            scope = (reader.phase, reader.module)
        found = self.made.get((value, layout, scope))
        if found is not None:
            return found
        current = self.made[value, here, None]
        for step in reshard(self.program.values[value].shape, self.axes, here, layout):
            known = self.made.get((value, step.after, scope))
            if known is None:
                known = self._step(value, current, step, reader, label, scope)
            current = known
        self.made.setdefault((value, layout, scope), current)  # it may be spelled otherwise
        return current

    def _step(
        self,
        value: int,
        current: int,
        step: Step,
        reader: Op,
        label: str,
        scope: tuple[str, str] | None,
    ) -> int:
        shape = self.program.values[value].shape
        place = step.before.on(step.axis)
        target = step.after.on(step.axis)
        args: list[Arg] = [Ref(current), step.axis]
        for shard in (place, target):
            if isinstance(shard, Shard):
                found = slab(shape, step.before, self.axes, self.coordinates, step.axis, shard)
                args.append((found.dim, found.outer, found.unit, found.starts, found.lengths))
        if isinstance(place, Partial) or isinstance(target, Partial):
            args.append(place.op if isinstance(place, Partial) else target.op)  # type: ignore[union-attr]
        result = self.new(value, step.after, scope)
        if isinstance(place, Partial):
            self.lies[value] = step.after  # paid for once; later readers start from here
            self.made[value, step.after, None] = result
        notes: tuple[tuple[str, Arg], ...] = (
            ("before", str(step.before)),
            ("after", str(step.after)),
            ("value", label or self._name(value)),
            ("load", max(self._even(value, step.before), self._even(value, step.after))),
        )
        self.ops.append(
            Op(
                f"comm.{step.kind}",
                tuple(args),
                notes,
                (result,),
                phase=reader.phase,
                module=reader.module,
                source=reader.source,
            )
        )
        return result

    def _even(self, value: int, layout: Layout) -> int:
        """Elements that a rank has of a value, were its shards even."""
        sizes = {axis.name: axis.size for axis in self.axes}
        parts = math.prod(sizes[a] for a, p in layout.placements if isinstance(p, Shard))
        return self.program.values[value].elements // parts

    def _name(self, value: int) -> str:
        """The input that a value is, or a view of; else empty."""
        while value not in self.names:
            op = self.program.ops[self.producers[value]]
            if len(op.inputs) != 1:
                return ""
            value = op.inputs[0]
        return self.names[value]

    def op(self, number: int, op: Op) -> None:
        """Write one op: operands brought, arguments made local, results laid out."""
        if op.base == "meshwright.annotate":
            self._annotated(number, op)
            return
        rule = self.completed.rules[number]
        carried = dict(self.completed.carried[number])
        layouts, through = self._operands(rule, op, carried)
        wanted = iter(
            self.bring(value, layout, op) for value, layout in zip(op.inputs, layouts, strict=True)
        )
        brought = list(wanted)
        feed = iter(brought)
        args, kwargs = map_refs((op.args, op.kwargs), lambda _: next(feed))
        results = []
        for place, value in enumerate(op.results):
            placements: dict[str, Placement] = {}
            for axis, carry in carried.items():
                shard = placed(rule, len(op.inputs) + place, axis, carry)
                apart = (place, carry.factor) in rule.unaffected
                owed = None if apart else Partial(rule.reduction)
                placements[axis] = owed if shard is None else shard
            placements |= dict.fromkeys(through, Partial())
            results.append(self.new(value, Layout.of(self.axes, placements)))
        args = self._local_args(rule, op, args, brought, results)
        made = iter(results)
        outputs = tuple(None if value is None else next(made) for value in op.outputs)
        local = replace(op, args=args, kwargs=kwargs, outputs=outputs)
        if self.restrides and op.name == "aten.view.default":
            local = replace(local, name="aten.reshape.default")
        self.ops += self._spread(rule, self._windowed(rule, local, dict(carried), number), number)
        for value in op.results:
            self._pay(value, op)

    def _pay(self, value: int, op: Op) -> None:
        """Pay for what was made, over the axes where waiting would cost more."""
        layout = self.lies[value]
        for axis in layout.partial_axes:
            if value in self.early.get(axis, ()):
                layout = layout.change(self.axes, axis, None)
        self.bring(value, layout, op)

    def _spread(self, rule: Rule, local: Op, number: int) -> Sequence[Op]:
        """The op, or those that run it where an axis splits a dim that its windows go over."""
        halos = dict(rule.halos)
        for axis, carry in self.completed.carried[number]:
            if carry.factor in halos:
                return self._spreader(number, halos[carry.factor], axis).write(local)
            if carry.factor == rule.ring:
                return self._ring(number, axis).write(local)
        return [local]

    def _ring(self, number: int, axis: str) -> Ring:
        op, rule = self.program.ops[number], self.completed.rules[number]
        key = next(place for name, place, _ in rule.beside if name == axis)
        keys = self.program.values[op.inputs[key]].shape[2]
        here, parts = self.coordinates[axis], self.sizes[axis]
        return Ring(axis, here, parts, keys, self.values, self.scratch)

    def _spreader(self, number: int, halo: Halo, axis: str) -> Spreader:
        op, values = self.program.ops[number], self.program.values
        made = op.inputs[0] if halo.gradient is not None else op.results[0]
        rows, size = values[op.inputs[halo.operand]].shape, self.sizes[axis]
        found = spans(halo, rows[halo.dim], values[made].shape[halo.dim], size)
        here = self.coordinates[axis]
        return Spreader(halo, axis, here, found, self.values, self.scratch, self.read)

    def scratch(self, value: Value) -> int:
        """A local value that is a part of no global one."""
        self.values.append(value)
        self.origin.append((-1, Layout()))
        return len(self.values) - 1

    def _annotated(self, number: int, op: Op) -> None:
        """An annotation is no op: its result is its operand, brought to where it was said to lie.

        Over an axis of which nothing was said it lies as it came.
        """
        (operand,), (result,) = op.inputs, op.results
        carried = dict(self.completed.carried[number])
        said = dict(self.completed.places)
        placements: dict[str, Placement] = {}
        for axis in self.axes:
            name = axis.name
            if result in said.get(name, {}):
                placements[name] = said[name][result]
            elif name not in carried and isinstance(self.lies[operand].on(name), Partial):
                placements[name] = self.lies[operand].on(name)
        layout = Layout.of(self.axes, placements)
        local = self.bring(operand, layout, op)
        self.lies[result] = self.first[result] = layout
        self.made[result, layout, None] = local

    def _operands(
        self, rule: Rule, op: Op, carried: Mapping[str, object]
    ) -> tuple[list[Layout], list[str]]:
        """The layout that each operand must have, and the axes whose partial sums pass through."""
        placements: list[dict[str, Placement]] = [{} for _ in op.inputs]
        through: list[str] = []
        for axis in self.axes:
            name = axis.name
            carry = dict(carried).get(name)
            if carry is not None:
                contracts = all(shard_of(rule, dims, carry) is None for dims in rule.results)  # type: ignore[arg-type]
                for place in range(len(rule.operands)):
                    shard = placed(rule, place, name, carry)  # type: ignore[arg-type]
                    added = contracts and place in rule.addends
                    placements[place][name] = Partial() if added else shard
                continue
            group = self._linear_group(rule, op, name)
            if group is not None:
                through.append(name)
                for place in group:
                    placements[place][name] = Partial()
        return [Layout.of(self.axes, found) for found in placements], through

    def _linear_group(self, rule: Rule, op: Op, axis: str) -> frozenset[int] | None:
        """The operands through which a partial sum over `axis` may pass, if it may.

        Partial operands outside the group are paid for. Group members that are replicated are
        counted once, at coordinate 0; a shard would have to be gathered.
        """
        lies = [self.lies[value].on(axis) for value in op.inputs]
        if axis in rule.apart:
            owed = self.first[op.inputs[0]].on(axis) == Partial("sum")  # it may be paid for by now
            return frozenset({0}) if owed else None
        owing = {place for place, found in enumerate(lies) if found == Partial("sum")}
        for group in rule.linear:
            if group & owing and all(
                lies[place] is None or lies[place] == Partial("sum") for place in group
            ):
                return group
        return None

    def _local_args(
        self,
        rule: Rule,
        op: Op,
        args: tuple[Arg, ...],
        brought: Sequence[int],
        results: Sequence[int],
    ) -> tuple[Arg, ...]:
        """Sizes inside arguments become local; a random draw learns where its samples start."""
        changed = list(args)
        for place, result in rule.shape_args:
            changed[place] = self.values[results[result]].shape
        for place, operand, dim in rule.count_args:
            changed[place] = self.values[brought[operand]].shape[dim]
        if rule.arguments is not None:
            local = [self.values[result] for result in results]
            changed = list(rule.arguments(tuple(changed), local))
        if op.base == "meshwright.draw":
            changed[6] = self._starts(op.results[0], self.origin[results[0]][1])
        return tuple(changed)

    def _windowed(self, rule: Rule, op: Op, carried: Mapping[str, Carry], number: int) -> Op:
        """The op, or the one that runs on a window of the factor that axes carry."""
        if rule.window is None:
            return op
        factor, name = rule.window
        split = {axis: carry for axis, carry in carried.items() if carry.factor == factor}
        if not split:
            return op
        whole = self.program.ops[number]
        dims = (*rule.operands, *rule.results)
        values = (*whole.inputs, *whole.results)
        shape, layout = next(
            (self.program.values[value].shape, {a: shard_of(rule, d, c) for a, c in split.items()})
            for value, d in zip(values, dims, strict=True)
            if shard_of(rule, d, next(iter(split.values()))) is not None
        )
        lies = Layout.of(self.axes, layout)
        starts = self._begins(shape, lies)
        return replace(op, name=name, args=(*op.args, rule.sizes[factor], starts), kwargs=())

    def _starts(self, value: int, layout: Layout) -> Arg:
        """((axis, start of each coordinate's samples), ...) of a random draw."""
        return self._begins(self.program.values[value].shape, layout)

    def _begins(self, shape: tuple[int, ...], layout: Layout) -> Arg:
        """((axis, where each coordinate's part begins), ...) of a value under a layout."""
        found: list[Arg] = []
        for name, place in layout.placements:
            assert isinstance(place, Shard)
            lies = slab(shape, layout, self.axes, self.coordinates, name, place)
            found.append((name, lies.starts))
        return tuple(found)
