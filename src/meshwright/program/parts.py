"""Fused weights: one tensor for several products of unequal widths, found from the graph.

A dim is fused where what is made of it is cut: queries, one key and one value; a gate, channels
and time steps. Cuts are carried back, op by op along one factor, to the weights that they cut.

    W (48, 32) -> x W^T -> + b (48) -> split (32, 8, 8)      W and b are parts of 32, 8 and 8
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from meshwright.program.program import Op, Program, Value
from meshwright.program.rules import Dim, Rule, rule_of

__all__ = [
    "Cuts",
    "Parts",
    "Span",
    "cuts_of",
    "factor_cuts",
    "fused_weights",
    "span_of",
    "tensor_cuts",
]

MOST_WEIGHTS = 8
"""Weights that one cut may go back to. A cut of a residual stream goes back to all of them."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Dim `dim` is parts of these sizes side by side."""

    dim: int
    sizes: tuple[int, ...]

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each."""
        stops = [sum(self.sizes[: k + 1]) for k in range(len(self.sizes))]
        return tuple(pairwise([0, *stops]))

    @property
    def even(self) -> bool:
        """Whether all are of one size."""
        return len(set(self.sizes)) == 1

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Of each part of a value of this shape."""
        return [(*shape[: self.dim], size, *shape[self.dim + 1 :]) for size in self.sizes]

    def names(self, name: str) -> tuple[str, ...]:
        """What the parts of a parameter are called: as one would write it."""
        before = ":, " * self.dim
        return tuple(f"{name}[{before}{start}:{stop}]" for start, stop in self.bounds)


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a value's dim is cut; never at its ends."""

    dim: int
    places: frozenset[int]

    def parts(self, size: int) -> Parts:
        """The parts of a dim of `size`."""
        borders = [0, *sorted(self.places), size]
        return Parts(self.dim, tuple(b - a for a, b in pairwise(borders)))


@dataclass(frozen=True, slots=True)
class Span:
    """An op that cuts a dim, or joins it: `whole` and which of it the pieces are.

    Attributes:
        pieces: (value, start, stop); None for a result that nobody reads.
        cuts: whether pieces are made of the whole; else the whole is made of pieces and zeros.
    """

    whole: int
    dim: int
    pieces: tuple[tuple[int | None, int, int], ...]
    cuts: bool


def span_of(op: Op, values: Sequence[Value]) -> Span | None:
    """How an op cuts or joins a dim; None if it does neither."""
    maker = _SPANS.get(op.base)
    return None if maker is None else maker(op, values)


def _split(op: Op, values: Sequence[Value]) -> Span | None:
    shape = values[op.inputs[0]].shape
    dim = _number(op, 2, 0) % len(shape)
    given = op.args[1]
    if isinstance(given, int):
        sizes = [min(given, shape[dim] - start) for start in range(0, shape[dim], given or 1)]
    else:
        assert isinstance(given, tuple)
        sizes = [size for size in given if isinstance(size, int)]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    if len(op.outputs) != len(sizes):
        return None
    pieces = zip(op.outputs, starts, sizes, strict=True)
    return Span(op.inputs[0], dim, tuple((v, a, a + n) for v, a, n in pieces), cuts=True)


def _number(op: Op, place: int, default: int) -> int:
    found = op.args[place] if place < len(op.args) else default
    return found if isinstance(found, int) else default


def _begin(start: int, size: int) -> int:
    """Where a slice begins: counted from the end where negative."""
    return min(start, size) if start >= 0 else max(0, start + size)


def _slice(op: Op, values: Sequence[Value]) -> Span | None:
    (value, *_), (result,) = op.inputs, op.results
    shape = values[value].shape
    dim = _number(op, 1, 0) % len(shape)
    begin, length = _begin(_number(op, 2, 0), shape[dim]), values[result].shape[dim]
    if _number(op, 4, 1) != 1 or not length:
        return None
    return Span(value, dim, ((result, begin, begin + length),), cuts=True)


def _slice_backward(op: Op, values: Sequence[Value]) -> Span | None:
    (value, *_), (result,) = op.inputs, op.results
    shape = values[result].shape
    dim = _number(op, 2, 0) % len(shape)
    begin, length = _begin(_number(op, 3, 0), shape[dim]), values[value].shape[dim]
    if _number(op, 5, 1) != 1 or not length:
        return None
    return Span(result, dim, ((value, begin, begin + length),), cuts=False)


def _cat(op: Op, values: Sequence[Value]) -> Span | None:
    (result,) = op.results
    rank = len(values[result].shape)
    dim = _number(op, 1, 0) % rank
    if any(len(values[value].shape) != rank for value in op.inputs):
        return None
    stops = [0]
    for value in op.inputs:
        stops.append(stops[-1] + values[value].shape[dim])
    pieces = zip(op.inputs, stops[:-1], stops[1:], strict=True)
    return Span(result, dim, tuple(pieces), cuts=False)


_SPANS = {
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.unsafe_split"), _split),
    "aten.slice": _slice,
    "aten.slice_backward": _slice_backward,
    "aten.cat": _cat,
}


def factor_cuts(rule: Rule, dims: Sequence[Dim], cuts: Cuts) -> tuple[int, frozenset[int]] | None:
    """(factor, where it is cut) for cuts of a tensor of these dims; None where they cut across."""
    factors = dims[cuts.dim]
    if not factors or factors[0] in rule.whole or factors[0] in dict(rule.halos):
        return None
    unit = math.prod(rule.sizes[f] for f in factors[1:])
    if any(place % unit for place in cuts.places):
        return None
    return factors[0], frozenset(place // unit for place in cuts.places)


def tensor_cuts(rule: Rule, dims: Sequence[Dim], factor: int, at: frozenset[int]) -> Cuts | None:
    """The cuts of a tensor of these dims where a factor is cut; None if it has it not."""
    for dim, factors in enumerate(dims):
        if factors and factors[0] == factor:
            unit = math.prod(rule.sizes[f] for f in factors[1:])
            return Cuts(dim, frozenset(place * unit for place in at))
    return None


def _carried(
    op: Op, rule: Rule, span: Span | None, given: tuple[int, Cuts]
) -> Iterator[tuple[int, Cuts]]:
    """What cuts of one tensor of an op mean for the others."""
    value, cuts = given
    if span is not None and span.dim == cuts.dim:
        yield from _along(span, value, cuts)
        return
    tensors = [
        *zip(op.inputs, rule.operands, strict=True),
        *zip(op.results, rule.results, strict=True),
    ]
    for dims in [dims for other, dims in tensors if other == value]:
        found = factor_cuts(rule, dims, cuts)
        if found is None:
            continue
        for other, theirs in tensors:
            made = tensor_cuts(rule, theirs, *found)
            if made is not None:
                yield other, made


def _along(span: Span, value: int, cuts: Cuts) -> Iterator[tuple[int, Cuts]]:
    """Cuts through an op that itself cuts or joins the dim."""
    for piece, start, stop in span.pieces:
        if piece == value:
            yield span.whole, Cuts(cuts.dim, frozenset(place + start for place in cuts.places))
        elif value == span.whole and piece is not None:
            inside = frozenset(place - start for place in cuts.places if start < place < stop)
            if inside:
                yield piece, Cuts(cuts.dim, inside)


def cuts_of(program: Program, rules: Sequence[Rule], fused: Mapping[str, Parts]) -> dict[int, Cuts]:
    """Where every value is cut: forward from the weights, backward from their gradients."""
    found: dict[int, Cuts] = {}
    for name, value in (*program.inputs, *program.outputs):
        kind, _, bare = name.partition("/")
        if kind in ("model", "gradient") and bare in fused:
            parts = fused[bare]
            found[value] = Cuts(parts.dim, frozenset(stop for _, stop in parts.bounds[:-1]))
    order = list(zip(program.ops, rules, strict=True))
    changed = True
    while changed:
        changed = False
        for op, rule in order:
            changed |= _push(program, op, rule, found, forward=True)
        for op, rule in reversed(order):
            if op.phase == "backward":
                changed |= _push(program, op, rule, found, forward=False)
    return found


def _push(program: Program, op: Op, rule: Rule, found: dict[int, Cuts], *, forward: bool) -> bool:
    """Carry the cuts of an op's tensors on to its results, or to its operands."""
    known = dict.fromkeys(v for v in (*op.inputs, *op.results) if v in found)
    targets = op.results if forward else op.inputs
    changed = False
    for value in known:
        span = span_of(op, program.values)
        for other, cuts in _carried(op, rule, span, (value, found[value])):
            old = found.get(other)
            if other not in targets or (old is not None and old.dim != cuts.dim):
                continue
            places = cuts.places | (old.places if old else frozenset())
            if old is None or places != old.places:
                found[other] = Cuts(cuts.dim, places)
                changed = True
    return changed


@dataclass(slots=True)
class _Finder:
    """The forward part of a program, searched from what cuts back to the weights."""

    program: Program
    names: dict[int, str]
    producers: dict[int, int]
    rules: dict[int, Rule] = field(default_factory=dict)

    def rule(self, number: int) -> Rule:
        """The rule of an op, made when it is first asked for."""
        if number not in self.rules:
            self.rules[number] = rule_of(self.program.ops[number], self.program.values)
        return self.rules[number]

    def weights(self, value: int, cuts: Cuts) -> dict[str, Cuts]:
        """The weights that cuts of a value go back to."""
        seen, queue = {value: cuts}, [value]
        found: dict[str, Cuts] = {}
        while queue and len(found) <= MOST_WEIGHTS:
            here = queue.pop()
            if here in self.names:
                found[self.names[here]] = seen[here]
                continue
            number = self.producers.get(here)
            if number is None:
                continue
            op, rule = self.program.ops[number], self.rule(number)
            span = span_of(op, self.program.values)
            for other, theirs in _carried(op, rule, span, (here, seen[here])):
                if other in op.inputs and other not in seen:
                    seen[other] = theirs
                    queue.append(other)
        return found if len(found) <= MOST_WEIGHTS else {}


def fused_weights(program: Program, without: Iterable[str] = ()) -> list[dict[str, Parts]]:
    """Weights whose parts are of unequal widths, in groups that are cut together.

    Args:
        program: of a micro-batch, with global shapes.
        without: parameters that are to be left alone.
    """
    left = frozenset(without)
    names = {value: n.removeprefix("model/") for n, value in program.inputs if n[:6] == "model/"}
    finder = _Finder(program, names, program.producers())
    groups: list[dict[str, Cuts]] = []
    for op in program.ops:
        span = span_of(op, program.values) if op.phase == "forward" else None
        if span is None or not span.cuts:
            continue
        for place in sorted(_borders(span, program.values[span.whole].shape[span.dim])):
            found = finder.weights(span.whole, Cuts(span.dim, frozenset({place})))
            if found and not left & found.keys():
                groups = _joined(groups, found)
    shapes = {name: program.values[value].shape for value, name in names.items()}
    parts = [{n: c.parts(shapes[n][c.dim]) for n, c in group.items()} for group in groups]
    return [group for group in parts if not all(found.even for found in group.values())]


def _borders(span: Span, size: int) -> set[int]:
    return {place for _, *ends in span.pieces for place in ends} - {0, size}


def _joined(groups: list[dict[str, Cuts]], found: Mapping[str, Cuts]) -> list[dict[str, Cuts]]:
    """The groups with one more cut; those that share a weight are one."""
    touched = [group for group in groups if group.keys() & found.keys()]
    rest = [group for group in groups if not group.keys() & found.keys()]
    union: dict[str, Cuts] = {}
    for group in (*touched, found):
        for name, cuts in group.items():
            known = union.get(name, cuts)
            if known.dim != cuts.dim:  # a weight that is cut both ways is no fused one
                return groups
            union[name] = Cuts(cuts.dim, known.places | cuts.places)
    return [*rest, union]
