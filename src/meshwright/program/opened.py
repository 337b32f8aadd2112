"""A program with its fused weights taken apart: each part is an input of its own.

Whatever is made along a fused dim is made part by part, forward and backward, by the factors of the
rules: `x W^T` becomes one product per part, the gradient of x their sum. Where an op cannot be done
so, it gets the parts side by side. Values that stay keep their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.program.parts import (
    Cuts,
    Parts,
    Span,
    cuts_of,
    factor_cuts,
    span_of,
    tensor_cuts,
)
from meshwright.program.program import (
    Arg,
    Op,
    Program,
    Ref,
    Symbol,
    Value,
    map_refs,
    without_dead_ops,
)
from meshwright.program.rules import Dim, Rule, rule_of

__all__ = ["opened"]

Pieces = tuple[int | None, ...]
"""The value of each part; None is zeros."""


def opened(program: Program, fused: Mapping[str, Parts]) -> Program:
    """The program with these weights as inputs by part, and their gradients as outputs by part."""
    inputs = dict(program.inputs)
    fused = {name: parts for name, parts in fused.items() if f"model/{name}" in inputs}
    if not fused:
        return program
    rules = [rule_of(op, program.values) for op in program.ops]
    opener = _Opener(program, rules, cuts_of(program, rules, fused))
    entries: list[tuple[str, int]] = []
    for name, value in program.inputs:
        parts = fused.get(name.removeprefix("model/"))
        if parts is None or not name.startswith("model/"):
            entries.append((name, value))
            continue
        made = opener.new_parts(value, parts)
        entries += zip(parts.names(name), made, strict=True)
        opener.parts[value] = made
    for number in range(len(program.ops)):
        opener.step(number)
    outputs: list[tuple[str, int]] = []
    for name, value in program.outputs:
        parts = fused.get(name.removeprefix("gradient/"))
        if parts is None or not name.startswith("gradient/"):
            outputs.append((name, opener.whole(value)))
        else:
            outputs += zip(parts.names(name), opener.gradients(value, parts), strict=True)
    found = Program(tuple(opener.values), tuple(entries), tuple(opener.ops), tuple(outputs))
    return without_dead_ops(found)


class _Opener:
    """Writes the opened program op by op.

    Attributes:
        parts: value -> its parts, where it is not made whole.
        sliced: value -> its parts, cut off the whole.
        renamed: value -> the part that it is.
    """

    def __init__(self, program: Program, rules: Sequence[Rule], cuts: Mapping[int, Cuts]) -> None:
        self.program, self.rules, self.cuts = program, rules, cuts
        self.values = list(program.values)
        self.ops: list[Op] = []
        self.parts: dict[int, Pieces] = {}
        self.sliced: dict[tuple[int, Parts], Pieces] = {}
        self.joined: set[int] = set()
        self.renamed: dict[int, int] = {}
        self.at = Op("", ())

    def new(self, like: int, shape: tuple[int, ...]) -> int:
        """A new value of the dtype of another one."""
        self.values.append(Value(self.program.values[like].dtype, shape))
        return len(self.values) - 1

    def new_parts(self, value: int, parts: Parts) -> tuple[int, ...]:
        """New values for the parts of one."""
        shape = self.program.values[value].shape
        return tuple(self.new(value, _resized(shape, parts.dim, size)) for size in parts.sizes)

    def write(self, name: str, args: tuple[Arg, ...], result: int, **kwargs: Arg) -> int:
        """An op that stands beside the one being done."""
        named = tuple(kwargs.items())
        self.ops.append(
            replace(self.at, name=name, args=args, kwargs=named, outputs=(result,), packed=False)
        )
        return result

    def zeros(self, value: int) -> int:
        """A value's place filled with zeros."""
        made = self.values[value]
        dtype = Symbol("dtype", made.dtype)
        return self.write("aten.full.default", (made.shape, 0), value, dtype=dtype)

    def parts_of(self, value: int) -> Parts:
        """How a value that has cuts is parted."""
        cuts = self.cuts[value]
        return cuts.parts(self.program.values[value].shape[cuts.dim])

    def whole(self, value: int) -> int:
        """A value in one piece."""
        if value in self.renamed:
            return self.renamed[value]
        if value in self.parts and value not in self.joined:
            self.joined.add(value)
            parts = self.parts_of(value)
            shape = self.program.values[value].shape
            found: list[Arg] = [
                Ref(
                    self.zeros(self.new(value, _resized(shape, parts.dim, size)))
                    if p is None
                    else p
                )
                for p, size in zip(self.parts[value], parts.sizes, strict=True)
            ]
            self.write("aten.cat.default", (tuple(found), parts.dim), value)
        return value

    def apart(self, value: int, parts: Parts) -> Pieces:
        """A value in these parts."""
        if value in self.parts and self.parts_of(value) == parts:
            return self.parts[value]
        if (value, parts) not in self.sliced:
            source, made = self.whole(value), self.new_parts(value, parts)
            for result, (start, stop) in zip(made, parts.bounds, strict=True):
                self.write("aten.slice.Tensor", (Ref(source), parts.dim, start, stop), result)
            self.sliced[value, parts] = made
        return self.sliced[value, parts]

    def gradients(self, value: int, parts: Parts) -> tuple[int, ...]:
        """The parts of a gradient, zeros written out."""
        self.at = Op("", (), phase="backward")
        shape = self.program.values[value].shape
        return tuple(
            self.zeros(self.new(value, _resized(shape, parts.dim, size))) if p is None else p
            for p, size in zip(self.apart(value, parts), parts.sizes, strict=True)
        )

    def step(self, number: int) -> None:
        """Do one op: by parts where it can be, else as it is."""
        op, rule = self.program.ops[number], self.rules[number]
        self.at = op
        if not any(v in self.cuts for v in (*op.inputs, *op.results)):
            self.ops.append(self._as_it_is(op))
            return
        span = span_of(op, self.program.values)
        if span is not None and self.cuts.get(span.whole, Cuts(-1, frozenset())).dim == span.dim:
            if not self._spanned(span):
                self.ops.append(self._as_it_is(op))
            return
        factor = self._factor(op, rule)
        if factor is None or not self._distributes(op, rule, factor[0]):
            self.ops.append(self._as_it_is(op))
        else:
            self._distributed(op, rule, *factor)

    def _as_it_is(self, op: Op) -> Op:
        args, kwargs = map_refs((op.args, op.kwargs), self.whole)
        return replace(op, args=args, kwargs=kwargs)

    def _spanned(self, span: Span) -> bool:
        """Parts picked out of the whole, or put into it; False where ends do not meet."""
        parts = self.parts_of(span.whole)
        given = [piece for piece in span.pieces if piece[1] < piece[2]]
        if len(given) < len(span.pieces) or not all(_meets(parts, *ends) for _, *ends in given):
            return False
        if not span.cuts:
            made = [self._filled(span, parts, *ends) for ends in parts.bounds]
            self.parts[span.whole] = tuple(made)
            return True
        found = self.apart(span.whole, parts)
        for value, start, stop in given:
            if value is not None:
                self._picked(value, start, stop, parts, found)
        return True

    def _picked(self, value: int, start: int, stop: int, parts: Parts, found: Pieces) -> None:
        """A value that is one of the parts, or some, or a piece of one."""
        ends = list(zip(parts.bounds, found, strict=True))
        inside = [part for (a, b), part in ends if start <= a and b <= stop]
        if len(inside) > 1:
            self.parts[value] = tuple(inside)
        elif inside and inside[0] is not None:
            self.renamed[value] = inside[0]
        else:
            begin, part = next((a, part) for (a, b), part in ends if a <= start and stop <= b)
            if part is None:
                self.zeros(value)
            else:
                args = (Ref(part), parts.dim, start - begin, stop - begin)
                self.write("aten.slice.Tensor", args, value)

    def _filled(self, span: Span, parts: Parts, begin: int, end: int) -> int | None:
        """The part from `begin` to `end` of a value that pieces and zeros make up."""
        inner: list[tuple[int, int, int]] = []
        for value, start, stop in span.pieces:
            assert value is not None
            if start <= begin and end <= stop:
                if (start, stop) == (begin, end):
                    return self.whole(value)
                inside = [(a, b) for a, b in parts.bounds if start <= a and b <= stop]
                theirs = Parts(parts.dim, tuple(b - a for a, b in inside))
                return self.apart(value, theirs)[inside.index((begin, end))]
            if begin <= start and stop <= end:
                inner.append((self.whole(value), start - begin, stop - begin))
        if not inner:
            return None
        shape = _resized(self.program.values[span.whole].shape, parts.dim, end - begin)
        result = self.new(span.whole, shape)
        if sum(stop - start for _, start, stop in inner) == end - begin:
            refs = tuple(Ref(value) for value, _, _ in inner)
            return self.write("aten.cat.default", (refs, parts.dim), result)
        ((value, start, stop),) = inner  # a joint has one piece and zeros, or pieces alone
        args = (Ref(value), shape, parts.dim, start, stop, 1)
        return self.write("aten.slice_backward.default", args, result)

    def _factor(self, op: Op, rule: Rule) -> tuple[int, frozenset[int]] | None:
        """The one factor that the cuts of all the op's tensors cut, and where."""
        tensors = [
            *zip(op.inputs, rule.operands, strict=True),
            *zip(op.results, rule.results, strict=True),
        ]
        found = {
            factor_cuts(rule, dims, self.cuts[value])
            for value, dims in tensors
            if value in self.cuts
        }
        return found.pop() if len(found) == 1 else None

    def _distributes(self, op: Op, rule: Rule, factor: int) -> bool:
        """Whether an op may be done part by part along a factor."""
        dims = (*rule.operands, *rule.results)
        inner = any(factor in factors[1:] for tensor in dims for factors in tensor)
        inner |= any(sum(factor in factors for factors in tensor) > 1 for tensor in dims)
        summed = [place for place, found in enumerate(rule.results) if not _has(found, factor)]
        adds = not summed or (rule.reduction == "sum" and not rule.addends)
        alone = rule.window is not None and rule.window[0] == factor
        draws = op.base in ("meshwright.draw", "meshwright.annotate")
        apart = any((place, factor) in rule.unaffected for place in summed)
        return not (inner or alone or draws or apart or rule.beside) and adds and rule.known

    def _distributed(self, op: Op, rule: Rule, factor: int, at: frozenset[int]) -> None:
        """One op per part; results that lack the factor are the sums of what each makes."""
        split = [tensor_cuts(rule, dims, factor, at) for dims in rule.operands]
        given: list[Pieces | int] = []
        for value, cuts in zip(op.inputs, split, strict=True):
            if cuts is None:
                given.append(self.whole(value))
            else:
                size = self.program.values[value].shape[cuts.dim]
                given.append(self.apart(value, cuts.parts(size)))
        made: list[tuple[int | None, ...]] = []
        for k in range(len(at) + 1):
            operands = [g if isinstance(g, int) else g[k] for g in given]
            made.append(self._part(op, rule, operands, self._shapes(op, rule, factor, at, k)))
        for place, value in enumerate(op.results):
            found = tuple(part[place] for part in made)
            if _has(rule.results[place], factor):
                self.parts[value] = found
            else:
                self._summed(value, found)

    def _shapes(
        self, op: Op, rule: Rule, factor: int, at: frozenset[int], k: int
    ) -> list[tuple[tuple[int, ...], ...]]:
        """The shapes of part `k`: of the operands, and of the results."""
        found = []
        for tensors, dims in ((op.inputs, rule.operands), (op.results, rule.results)):
            shapes = []
            for value, theirs in zip(tensors, dims, strict=True):
                shape, cuts = (
                    self.program.values[value].shape,
                    tensor_cuts(rule, theirs, factor, at),
                )
                if cuts is not None:
                    shape = _resized(shape, cuts.dim, cuts.parts(shape[cuts.dim]).sizes[k])
                shapes.append(shape)
            found.append(tuple(shapes))
        return found

    def _part(
        self,
        op: Op,
        rule: Rule,
        operands: list[int | None],
        shapes: list[tuple[tuple[int, ...], ...]],
    ) -> tuple[int | None, ...]:
        """One part of an op; None for results that are zeros."""
        empty = {place for place, value in enumerate(operands) if value is None}
        if empty and any(group <= empty for group in rule.linear):
            return (None,) * len(op.results)
        if (
            empty
            and op.name == "aten.add.Tensor"
            and not op.kwargs
            and shapes[0][0] == shapes[0][1]
        ):
            return (operands[1 - empty.pop()],)
        given = [
            self.zeros(self.new(op.inputs[place], shapes[0][place])) if value is None else value
            for place, value in enumerate(operands)
        ]
        results = [self.new(v, shape) for v, shape in zip(op.results, shapes[1], strict=True)]
        feed = iter(given)
        args, kwargs = map_refs((op.args, op.kwargs), lambda _: next(feed))
        args = self._local(rule, args, given, results)
        made = iter(results)
        outputs = tuple(None if value is None else next(made) for value in op.outputs)
        self.ops.append(replace(op, args=args, kwargs=kwargs, outputs=outputs))
        return tuple(results)

    def _local(
        self,
        rule: Rule,
        args: tuple[Arg, ...],
        operands: Sequence[int],
        results: Sequence[int],
    ) -> tuple[Arg, ...]:
        """Sizes inside arguments become those of the part."""
        changed = list(args)
        for place, result in rule.shape_args:
            changed[place] = self.values[results[result]].shape
        for place, operand, dim in rule.count_args:
            changed[place] = self.values[operands[operand]].shape[dim]
        if rule.arguments is not None:
            changed = list(rule.arguments(tuple(changed), [self.values[v] for v in results]))
        return tuple(changed)

    def _summed(self, value: int, terms: tuple[int | None, ...]) -> None:
        """The sum of what the parts make; it keeps its number."""
        found = [term for term in terms if term is not None]
        if not found:
            self.zeros(value)
            return
        total = found[0]
        for place, term in enumerate(found[1:], 2):
            shape = self.program.values[value].shape
            result = value if place == len(found) else self.new(value, shape)
            total = self.write("aten.add.Tensor", (Ref(total), Ref(term)), result)
        if len(found) == 1:
            self.renamed[value] = total


def _meets(parts: Parts, start: int, stop: int) -> bool:
    """Whether a piece is one or more of the parts, or lies in one."""
    bounds = parts.bounds
    begins, ends = {a for a, _ in bounds}, {b for _, b in bounds}
    return (start in begins and stop in ends) or any(a <= start and stop <= b for a, b in bounds)


def _has(dims: Sequence[Dim], factor: int) -> bool:
    return any(factor in factors for factors in dims)


def _resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
