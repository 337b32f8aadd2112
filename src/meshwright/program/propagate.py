"""Propagation: sparse annotations completed to every op, forward and backward, to a fix point.

Per axis, every op gets at most one *carried* factor (GSPMD, Xu et al. 2021, section 3.5; Shardy's
factors). Annotations refine only: what was pinned is never undone. Where operands disagree, the
factor that leaves the most bytes where they are wins, and the others are resharded by `partition`.

*Stored* inputs (weights under ZeRO) are laid out for rest, not for work: their layout follows views
and casts of themselves alone, so that a transposed weight stays a shard, and everything else reads
them whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from meshwright.errors import PlanError
from meshwright.plan.mesh import Axis
from meshwright.program.layout import REPLICATED, Layout, Placement, Shard, Split, disjoint
from meshwright.program.program import Program
from meshwright.program.rules import Carry, Dim, Rule, carry_of, placed, rule_of, shard_of

__all__ = ["Completed", "propagate"]

_Split = TypeVar("_Split", Carry, Shard)


@dataclass(frozen=True, slots=True)
class Completed:
    """The result: each op's rule and the factor that each axis carries through it.

    `inputs` are the layouts of the program's inputs, in order; `resting` the values that are
    stored weights or views of them; `places` tells, per axis, where each value was found to lie.
    """

    rules: tuple[Rule, ...]
    carried: tuple[tuple[tuple[str, Carry], ...], ...]
    inputs: tuple[Layout, ...]
    resting: frozenset[int]
    places: Mapping[str, Mapping[int, Placement]]


def propagate(
    program: Program,
    axes: Sequence[Axis],
    pinned: Mapping[int, Layout],
    stored: Mapping[int, Layout] | None = None,
    wanted: Mapping[int, Layout] | None = None,
) -> Completed:
    """Complete the annotations of `program`.

    Args:
        program: with global shapes.
        axes: of the mesh, major first; earlier axes choose first.
        pinned: value -> layout that it has (an input) or should have (any value). Inputs that
            neither `pinned` nor `stored` names are open: they take what their readers want.
        stored: inputs laid out for rest; where an input is `pinned` too, over the other axes.
        wanted: value -> layout that it should have over the axes that this one names.
    """
    stored, wanted = stored or {}, wanted or {}
    rules = tuple(rule_of(op, program.values) for op in program.ops)
    said = {axis.name: _said(program, rules, axis, pinned, stored, wanted) for axis in axes}
    places: dict[str, dict[int, Placement]] = {}
    carried: list[dict[str, Carry]] = [{} for _ in program.ops]
    resting: set[int] = set(stored)
    for axis in axes:
        if axis.size > 1:
            rests, works = said[axis.name]
            later = axes[axes.index(axis) + 1 :]
            taken = [*places.values(), *({**said[a.name][0], **said[a.name][1]} for a in later)]
            search = _Search(program, rules, axis, axes, taken, carried)
            resting |= search.rest(rests)
            places[axis.name] = search.complete({v: works[v] for v in works if v not in rests})
    closed = dict(pinned)
    for value, layout in stored.items():
        both = (*closed.get(value, REPLICATED).placements, *layout.placements)
        closed[value] = Layout.of(axes, dict(both))
    inputs = tuple(
        closed[value]
        if value in closed
        else Layout.of(axes, {name: found.get(value) for name, found in places.items()})
        for _, value in program.inputs
    )
    orders = [tuple(found.items()) for found in carried]
    return Completed(rules, tuple(orders), inputs, frozenset(resting), places)


def _said(
    program: Program,
    rules: Sequence[Rule],
    axis: Axis,
    pinned: Mapping[int, Layout],
    stored: Mapping[int, Layout],
    wanted: Mapping[int, Layout],
) -> tuple[dict[int, Placement], dict[int, Placement]]:
    """Where values rest over an axis, and where they lie at work, as far as that is said."""
    rests = {v: layout.on(axis.name) for v, layout in stored.items()}
    works = {v: layout.on(axis.name) for v, layout in pinned.items()}
    works |= {v: p for v, w in wanted.items() if (p := w.on(axis.name)) is not None}
    works |= _annotated(program, axis)
    works |= {op.inputs[0]: None for op, rule in zip(program.ops, rules, strict=True)
              if axis.name in rule.apart}  # fmt: skip
    return {v: p for v, p in rests.items() if p is not None or v not in works}, works


def _annotated(program: Program, axis: Axis) -> dict[int, Placement]:
    """What the program's annotations say of `axis`, by value.

    `context:2:4` splits the factor n of a dim that is (2, n, 4). What is said to be split over
    `data` counts samples, wherever they are counted (`sample`).

    Raises:
        PlanError: a dim has fewer elements than the axis has ranks.
    """
    found: dict[int, Placement] = {}
    wanted = "data" if axis.name == "sample" else axis.name
    for op in program.ops:
        if op.base != "meshwright.annotate":
            continue
        (value,), (_, dims, whole) = op.results, op.args
        assert isinstance(dims, str)
        assert isinstance(whole, str)
        names = [name.partition(":")[0] for name in dims.split(",")]
        if wanted in names:
            dim = names.index(wanted)
            inner = [int(size) for size in dims.split(",")[dim].split(":")[1:]]
            size = program.values[value].shape[dim]
            if size < axis.size:
                raise PlanError(
                    f"{op.source}: annotate splits dim {dim} over {axis.name}={axis.size}, but it "
                    f"has {size} elements; use {axis.name}={size} or fewer, or another dim"
                )
            found[value] = Shard(dim, *inner)
        elif wanted in whole.split(","):
            found[value] = None
    return found


class _Search:
    """The fix point over one axis, given what is `taken`.

    That is what axes before it took, and what is said of those after it.
    """

    def __init__(
        self,
        program: Program,
        rules: tuple[Rule, ...],
        axis: Axis,
        axes: Sequence[Axis],
        taken: Sequence[Mapping[int, Placement]],
        carried: list[dict[str, Carry]],
    ) -> None:
        self.program = program
        self.rules = rules
        self.axis = axis
        self.sizes = {a.name: a.size for a in axes}
        self.taken = taken
        self.carried = carried
        self.place: dict[int, Placement] = {}
        self.closed: set[int] = set()

    def rest(self, stored: Mapping[int, Placement]) -> set[int]:
        """Let stored layouts follow their own views; the values found."""
        place = dict(stored)
        for number, op in enumerate(self.program.ops):
            inputs = op.inputs
            if len(inputs) != 1 or inputs[0] not in place or len(op.results) != 1:
                continue
            rule, shard = self.rules[number], place[inputs[0]]
            if not rule.linear and op.base != "aten._to_copy":
                continue
            if not isinstance(shard, Shard):
                place[op.results[0]] = shard
                continue
            carry = carry_of(rule, rule.operands[0], shard)
            made = shard_of(rule, rule.results[0], carry) if carry else None
            if carry and made and self._fits(number, carry):
                self.carried[number][self.axis.name] = carry
                place[op.results[0]] = made
        self.closed |= set(place)
        return set(place)

    def complete(self, pinned: Mapping[int, Placement]) -> dict[int, Placement]:
        """Forward and backward until nothing changes; the shards found."""
        self.place |= pinned
        self.closed |= set(pinned)
        made = set(self.program.producers())
        self.open = {v for v in range(len(self.program.values)) if v not in self.closed}
        # Inputs are what they are; a made value that is pinned still tells its producer.
        self.inputs = set(range(len(self.program.values))) - made
        at_rest = [self.axis.name in found for found in self.carried]
        before = None
        while before != (found := (dict(self.place), self._refine(at_rest))):
            before = found
        return self.place

    def _refine(self, at_rest: Sequence[bool]) -> list[Carry | None]:
        """Choose every op's factor anew, knowing more of where values lie; the factors chosen.

        An op that chose early may not have known where all its operands would lie.
        """
        for found, rests in zip(self.carried, at_rest, strict=True):
            if not rests:
                found.pop(self.axis.name, None)
        changed = True
        while changed:
            forward = [self._forward(number) for number in range(len(self.program.ops))]
            backward = [self._backward(n) for n in reversed(range(len(self.program.ops)))]
            changed = any(forward) or any(backward)
        return [found.get(self.axis.name) for found in self.carried]

    def _forward(self, number: int) -> bool:
        """Choose the factor that keeps the most operand bytes in place, less what it owes."""
        if self.axis.name in self.carried[number]:
            return False
        votes: dict[Carry, int] = {}
        op, rule = self.program.ops[number], self.rules[number]
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            carry = self._carry(number, dims, value)
            if carry is not None and self._fits(number, carry):
                votes[carry] = votes.get(carry, 0) + self.program.values[value].bytes
        for carry in votes:
            for value, dims in zip(op.results, rule.results, strict=True):
                if shard_of(rule, dims, carry) is None:
                    votes[carry] -= self.program.values[value].bytes
        return self._choose(number, votes)

    def _backward(self, number: int) -> bool:
        """Choose the factor that its readers want the results to be split by."""
        if self.axis.name in self.carried[number]:
            return False
        votes: dict[Carry, int] = {}
        rule = self.rules[number]
        for value, dims in zip(self.program.ops[number].results, rule.results, strict=True):
            carry = self._carry(number, dims, value)
            if carry is not None and self._fits(number, carry):
                votes[carry] = votes.get(carry, 0) + self.program.values[value].bytes
        return self._choose(number, votes)

    def _carry(self, number: int, dims: tuple[Dim, ...], value: int) -> Carry | None:
        """The factor that an operand's or result's shard falls into."""
        rule, shard = self.rules[number], self.place.get(value)
        if not isinstance(shard, Shard):
            return None
        plain = {*dict(rule.halos), *rule.plain}
        if shard.outer == 1 and any((factor,) == dims[shard.dim] for factor in plain):
            # Rows in even blocks are rows.
            granules = shard.granules(self.program.values[value].shape[shard.dim])
            shard = Shard(shard.dim) if granules % self.axis.size == 0 else shard
        carry = carry_of(rule, dims, shard)
        if carry is None:
            return None
        others = [c for c in self.carried[number].values() if c.factor == carry.factor]
        return self._beside(rule.sizes[carry.factor], carry, others)

    def _beside(self, size: int, split: _Split, others: Sequence[Split]) -> _Split:
        """A split written as blocks, where it cuts across others but its blocks do not.

        One of 2 shares of 4 heads is one of 2 blocks of 2 heads, each of which may be cut again.
        """
        across = [o for o in others if o != split and not disjoint(size, split, o)]
        granules, left = divmod(size // (split.outer * split.unit), self.axis.size)
        if not across or left:
            return split
        blocks = replace(split, unit=split.unit * granules)
        return blocks if all(disjoint(size, blocks, other) for other in across) else split

    def _choose(self, number: int, votes: Mapping[Carry, int]) -> bool:
        if not votes:
            return False
        best = max(votes, key=lambda carry: (votes[carry], -carry.factor))
        self.carried[number][self.axis.name] = best
        op, rule = self.program.ops[number], self.rules[number]
        for place, value in enumerate((*op.inputs, *op.results)):
            shard = placed(rule, place, self.axis.name, best)
            if shard is None or value not in self.open or value in self.place:
                continue
            shard = self._beside(
                self.program.values[value].shape[shard.dim], shard, self._others(value, shard)
            )
            if self._free(value, shard):
                self.place[value] = shard
        return True

    def _fits(self, number: int, carry: Carry) -> bool:
        """Whether each coordinate gets a granule, and earlier axes took another or the same one."""
        size = self.rules[number].sizes[carry.factor]
        rule = self.rules[number]
        if self.axis.name != "context" and carry.factor in {*dict(rule.halos), rule.ring}:
            return False
        granules = size // (carry.outer * carry.unit)
        for name, other in self.carried[number].items():
            if other == carry:
                granules //= self.sizes[name]
            elif other.factor == carry.factor and not disjoint(size, carry, other):
                return False
        return granules >= self.axis.size

    def _free(self, value: int, shard: Shard) -> bool:
        """Whether no other axis splits the value's dim in a way that cuts across `shard`."""
        size = self.program.values[value].shape[shard.dim]
        return all(disjoint(size, shard, other) for other in self._others(value, shard))

    def _others(self, value: int, shard: Shard) -> list[Shard]:
        """How other axes split the value's dim otherwise."""
        found = [places.get(value) for places in self.taken]
        return [o for o in found if isinstance(o, Shard) and o.dim == shard.dim and o != shard]
