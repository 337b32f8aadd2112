"""Annotations found from the graph: tensor parallelism as Megatron-LM lays it out, on any program.

A weight may be split along an output dim when what it makes can be carried on, op by op and
without moving anything, until another weight contracts it: a column-parallel weight with its
row-parallel partner (Shoeybi et al. 2019, section 3). Only the former is annotated; the rest
follows by propagation. No name of a module is looked at.

    x -> [W1 split in columns] -> gelu -> [W2 contracts them] -> partial sums, one all-reduce
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.errors import PlanError
from meshwright.plan.mesh import SAMPLE_AXES, Axis
from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.program import Op, Program
from meshwright.program.propagate import propagate
from meshwright.program.rows import rows
from meshwright.program.rules import Carry, Rule, carry_of, rule_of, shard_of

__all__ = ["columns", "experts", "work_layouts"]


def work_layouts(
    program: Program, axes: Sequence[Axis], chosen: Mapping[str, Layout]
) -> dict[str, Layout]:
    """How parameters lie while they are worked with, over the axes other than `data`.

    Args:
        program: of a micro-batch, with global shapes.
        axes: of the mesh.
        chosen: what the user said, by parameter; over an axis of which nothing is said, the
            annotations are found (`tensor`).
    """
    inner = tuple(axis for axis in axes if axis.name not in SAMPLE_AXES and axis.size > 1)
    found = dict(chosen)
    for axis in axes:
        finder = _FINDERS.get(axis.name)
        if finder is None or axis.size == 1 or any(p.on(axis.name) for p in chosen.values()):
            continue
        for name, shard in finder(program, axis).items():
            layout = found.get(name, REPLICATED)
            found[name] = layout.change(axes, axis.name, shard)
    inputs = dict(program.inputs)
    pinned = {value: REPLICATED for name, value in inputs.items() if not _weight(name)}
    names = {axis.name for axis in inner}
    for name, layout in found.items():
        if name in chosen or names.intersection(dict(layout.placements)):
            pinned[inputs[f"model/{name}"]] = layout
    completed = propagate(program, inner, pinned)
    more = {
        value: Layout.of(axes, {axis.name: shard})
        for axis in inner
        if axis.name == "tensor" and all(p.on(axis.name) is None for p in chosen.values())
        for value, shard in rows(program, completed, axis).items()
    }
    if more:
        completed = propagate(program, inner, pinned | more)
    layouts = {
        name.removeprefix("model/"): layout
        for (name, _), layout in zip(program.inputs, completed.inputs, strict=True)
        if _weight(name)
    }
    for name, layout in found.items():  # over axes that split samples there is nothing to complete
        known = dict(layouts[name].placements)
        layouts[name] = Layout.of(axes, {**dict(layout.placements), **known})
    return layouts


def _weight(name: str) -> bool:
    return name.startswith("model/")


def experts(program: Program, axis: Axis) -> dict[str, Shard]:
    """The weights of experts, split between them.

    Raises:
        PlanError: there are none, or fewer experts than the axis has ranks.
    """
    graph = _Graph.of(program, axis.name)
    found: dict[str, Shard] = {}
    for op in graph.ops:
        if op.base != "meshwright.expert_mm" or op.inputs[2] not in graph.weights:
            continue
        name, chain = graph.weights[op.inputs[2]]
        shard, size = graph.parameter_shard(chain, Shard(0)), program.values[op.inputs[2]].shape[0]
        if size < axis.size:
            raise PlanError(
                f"plan asks for {axis.name}={axis.size}, but {name} has {size} experts; use "
                f"{axis.name}={size} or fewer"
            )
        if shard is not None:
            found[name] = shard
    if not found:
        raise PlanError(
            f"plan asks for {axis.name}={axis.size}, but no weights of the model are experts' (a "
            f"grouped product of rows sorted by expert); use data={axis.size}"
        )
    return found


def columns(program: Program, axis: Axis) -> dict[str, Shard]:
    """The weights that `axis` may split along an output dim, and how."""
    graph = _Graph.of(program, axis.name)
    found: dict[str, Shard] = {}
    rows: dict[str, Row] = {}
    for number, op in enumerate(graph.ops):
        for place, value, shard in graph.outputs_of(number, axis.size):
            weight = graph.weights[op.inputs[place]][0]
            if weight in found or weight in rows:
                continue
            path = graph.path(number, place, value, shard, axis.size)
            if path is not None and weight not in path.rows and not _torn(rows, path.rows, axis):
                found[weight] = path.shard
                rows.update(path.rows)
    return found


Row = tuple[Shard, int]
"""How a weight that contracts is split, and the size of the dim, as its op reads it."""

MOST_ROWS = 4
"""Weights that may contract what one split weight makes. A residual stream is contracted by all."""

_TRIES = 32
"""Finer splits that are tried for one weight: by fused part, by head, by element."""

_WORTH = 16
"""A reduction over the split dim is welcome where it leaves this many times less to add up."""

_GROWTH = 1.5
"""What is contracted in the end stays below so many times the largest value that was carried."""


@dataclass(frozen=True, slots=True)
class _Path:
    """A weight's split that can be carried on, and the weights that contract it in the end."""

    shard: Shard
    rows: Mapping[str, Row]


class _Finer(Exception):
    """The split cuts across a dim's factors: (outer, unit) by which it may be finer, in order."""

    def __init__(self, ways: Sequence[tuple[int, int]]) -> None:
        self.ways = ways


@dataclass(frozen=True, slots=True)
class _Graph:
    """A program's forward part.

    Attributes:
        weights: value -> the parameter that it is, or is a view or cast of, and through which ops.
        readers: value -> ops that read it.
    """

    program: Program
    axis: str
    ops: tuple[Op, ...]
    rules: tuple[Rule, ...]
    weights: Mapping[int, tuple[str, tuple[int, ...]]]
    readers: Mapping[int, Sequence[int]]

    @classmethod
    def of(cls, program: Program, axis: str) -> _Graph:
        """The forward part of `program`, which comes first."""
        ops = tuple(itertools.takewhile(lambda op: op.phase == "forward", program.ops))
        rules = tuple(rule_of(op, program.values) for op in ops)
        weights: dict[int, tuple[str, tuple[int, ...]]] = {
            value: (name.removeprefix("model/"), ())
            for name, value in program.inputs
            if _weight(name)
        }
        readers: dict[int, list[int]] = {}
        for number, (op, rule) in enumerate(zip(ops, rules, strict=True)):
            for value in set(op.inputs):
                readers.setdefault(value, []).append(number)
            views = rule.linear or op.base == "aten._to_copy"
            if len(op.inputs) == len(op.results) == 1 and views and op.inputs[0] in weights:
                name, chain = weights[op.inputs[0]]
                weights[op.results[0]] = (name, (*chain, number))
        return cls(program, axis, ops, rules, weights, readers)

    def outputs_of(self, number: int, parts: int) -> Iterator[tuple[int, int, Shard]]:
        """(operand, result, its shard) for what weights give a contraction as output dims."""
        op, rule = self.ops[number], self.rules[number]
        others = {
            factor
            for value, dims in zip(op.inputs, rule.operands, strict=True)
            if value not in self.weights
            for dim in dims
            for factor in dim
        }
        for place, value in enumerate(op.inputs):
            if value not in self.weights or not _contracts(rule, place):
                continue
            for factor in (f for dim in rule.operands[place] for f in dim):
                carry = Carry(factor)
                made = [shard_of(rule, dims, carry) for dims in rule.results]
                if factor in others or factor in rule.whole or rule.sizes[factor] < parts:
                    continue
                for result, shard in zip(op.results, made, strict=True):
                    if shard is not None:
                        yield place, result, shard
                        break

    def path(self, number: int, place: int, value: int, shard: Shard, parts: int) -> _Path | None:
        """How `shard` of `value` is carried on; None if it cannot be.

        Op `number` makes the value, and its operand `place` the weight that is to be split.
        """
        waiting = [shard]
        for _ in range(_TRIES):
            if not waiting:
                return None
            size = self.program.values[value].shape[waiting[0].dim]
            tried = _coarse(waiting.pop(0), size, parts)
            if tried.granules(size) < parts:
                continue
            try:
                rows = self._carry_on(value, tried)
            except _Finer as error:
                finer = [
                    replace(tried, outer=tried.outer * outer, unit=tried.unit * unit)
                    for outer, unit in error.ways
                ]
                waiting = finer + waiting
                continue
            if rows is not None and len(rows) <= MOST_ROWS:
                before = self._before(number, place, value, tried)
                return None if before is None else _Path(before, rows)
        return None

    def _before(self, number: int, place: int, value: int, shard: Shard) -> Shard | None:
        """The shard of the parameter that gives op `number`'s result this one."""
        op, rule = self.ops[number], self.rules[number]
        carry = carry_of(rule, rule.results[op.results.index(value)], shard)
        found = None if carry is None else shard_of(rule, rule.operands[place], carry)
        return self.parameter_shard(self.weights[op.inputs[place]][1], found)

    def parameter_shard(self, chain: Sequence[int], found: Shard | None) -> Shard | None:
        """The shard of a parameter that gives this one of what a chain of ops makes of it."""
        for step in reversed(chain):
            if found is None:
                return None
            view = self.rules[step]
            carry = carry_of(view, view.results[0], found)
            found = None if carry is None else shard_of(view, view.operands[0], carry)
        return found

    def _carry_on(self, value: int, shard: Shard) -> dict[str, Row] | None:
        """Carry a shard on; the weights that contract it, or None where it must be gathered.

        Raises:
            _Finer: a finer split may go further.
        """
        places: dict[int, Shard] = {value: shard}
        largest = self.program.values[value].bytes
        rows: dict[str, Row] = {}
        ended = False
        queue = list(self.readers.get(value, ()))
        heapq.heapify(queue)
        done: set[int] = set()
        while queue:
            reader = heapq.heappop(queue)
            if reader in done:
                continue
            done.add(reader)
            op, rule = self.ops[reader], self.rules[reader]
            carry = self._carry(op, rule, places)
            if carry is None or self._said_otherwise(op, places):
                return None
            made = [shard_of(rule, dims, carry) for dims in rule.results]
            if all(place is None for place in made):
                if not self._ends(op, rule, carry, rows, largest):
                    return None
                ended = True
                continue
            for result, place in zip(op.results, made, strict=True):
                if place is not None:
                    places[result] = place
                    largest = max(largest, self.program.values[result].bytes)
                    for after in self.readers.get(result, ()):
                        heapq.heappush(queue, after)
        values = self.program.values
        lost = {v for _, v in self.program.outputs} & places.keys()  # running statistics, little
        dear = sum(values[v].bytes for v in lost) * _WORTH > values[value].bytes
        return rows if ended and not dear else None

    def _carry(self, op: Op, rule: Rule, places: Mapping[int, Shard]) -> Carry | None:
        """The one factor that all operands that are split have split; None if there is none."""
        found: set[Carry] = set()
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            if value not in places:
                continue
            shard = places[value]
            carry = carry_of(rule, dims, shard)
            if carry is not None and carry.factor in {*dict(rule.halos), rule.ring}:
                return None
            if carry is None:
                ways = _finer(rule, dims[shard.dim], shard)
                if ways:
                    raise _Finer(ways)
                return None
            found.add(carry)
        return found.pop() if len(found) == 1 else None

    def _said_otherwise(self, op: Op, places: Mapping[int, Shard]) -> bool:
        """Whether the user's annotation wants the value elsewhere over this axis."""
        if op.base != "meshwright.annotate":
            return False
        _, dims, whole = op.args
        names = str(dims).split(",")
        if self.axis in names:
            return places[op.inputs[0]].dim != names.index(self.axis)
        return self.axis in str(whole).split(",")

    def _ends(self, op: Op, rule: Rule, carry: Carry, rows: dict[str, Row], largest: int) -> bool:
        """Whether a factor may end here: contracted by a weight, or summed to much less.

        A sum that is larger than what was carried is no saving (a residual stream, all of whose
        readers contract it).
        """
        sharing = [
            value
            for value, dims in zip(op.inputs, rule.operands, strict=True)
            if shard_of(rule, dims, carry) is not None
        ]
        values = self.program.values
        named: dict[str, Row] = {}
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            shard = shard_of(rule, dims, carry)
            if value in self.weights and shard is not None:
                named[self.weights[value][0]] = (shard, values[value].shape[shard.dim])
        before, after = (sum(values[v].bytes for v in found) for found in (sharing, op.results))
        if len(sharing) > 1:
            rows.update(named)
            return bool(named) and after < _GROWTH * largest
        return after * _WORTH <= before


def _torn(found: Mapping[str, Row], more: Mapping[str, Row], axis: Axis) -> bool:
    """Whether a weight that is contracted would have to be split in two ways."""
    return any(
        _evenly(*found[name], axis.size) != _evenly(*row, axis.size)
        for name, row in more.items()
        if name in found
    )


def _evenly(shard: Shard, size: int, parts: int) -> Shard:
    """The same split in as many granules as there are parts, where it is even."""
    n = shard.granules(size)
    return replace(shard, unit=shard.unit * n // parts) if n % parts == 0 else shard


def _contracts(rule: Rule, place: int) -> bool:
    """Whether operand `place` shares a factor with another operand that no result has."""
    kept = {f for dims in rule.results for dim in dims for f in dim}
    mine = {f for dim in rule.operands[place] for f in dim} - kept
    others = {f for k, dims in enumerate(rule.operands) if k != place for dim in dims for f in dim}
    return bool(mine & others)


def _coarse(shard: Shard, size: int, parts: int) -> Shard:
    """The same split in as many granules as there are parts, where it is even and not of elements.

    Queries in heads and keys in groups of heads are then split alike.
    """
    return _evenly(shard, size, parts) if shard.unit > 1 else shard


def _finer(rule: Rule, factors: Sequence[int], shard: Shard) -> list[tuple[int, int]]:
    """By how much (outer, unit) must grow for `shard` to lie in one factor of its dim."""
    size = math.prod(rule.sizes[f] for f in factors)
    found = []
    before = 1
    for factor in factors:
        after = size // (before * rule.sizes[factor])
        outer, unit = math.lcm(shard.outer, before), math.lcm(shard.unit, after)
        grown = (outer // shard.outer, unit // shard.unit)
        if factor not in rule.whole and size % (outer * unit) == 0 and grown != (1, 1):
            found.append(grown)
        before *= rule.sizes[factor]
    return found


_FINDERS: Mapping[str, Callable[[Program, Axis], dict[str, Shard]]] = {
    "tensor": columns,
    "expert": experts,
}
