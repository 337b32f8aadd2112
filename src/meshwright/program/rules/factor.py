"""Factors: what the dims of an op's operands and results have to do with each other.

A rule is an einsum-like list. `mm` is `i k, k j -> i j`: an axis that carries factor i shards the
first operand's dim 0 and the result's dim 0; one that carries k, which the result has not, leaves
the result partial. A dim may be a product of factors, major first: `view` from (samples x tokens)
to (samples, tokens) is `(b t) -> b t`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from meshwright.program.layout import Shard
from meshwright.program.program import Arg, Op, Ref, Value, refs

__all__ = [
    "Carry",
    "Dim",
    "Halo",
    "Localize",
    "OpView",
    "Rule",
    "RuleMaker",
    "carry_of",
    "einsum",
    "made",
    "placed",
    "shard_of",
    "whole",
]

Dim = tuple[int, ...]
"""The factors that a dim is a product of, major first; a dim of size 1 has none."""


Localize = Callable[[tuple[Arg, ...], Sequence[Value]], tuple[Arg, ...]]


@dataclass(frozen=True, slots=True)
class Halo:
    """A dim over which an op's windows reach from one part into the next.

    Attributes:
        dim: of the operand and of what is made of it.
        reach: rows that a window covers, first to last.
        stride: rows between windows.
        padding: rows before the first, of `fill`.
        place: of the argument that is the padding, per dim of space.
        operand: number of the operand that windows read.
        gradient: number of the output that is its gradient.
        positions: number of the output, or of a backward op's operand, that counts elements of a
            plane; each row of it has `width`.
    """

    dim: int
    reach: int
    stride: int
    padding: int
    place: int
    operand: int = 0
    gradient: int | None = None
    fill: float = 0.0
    positions: int | None = None
    width: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """How one op's dims hang together.

    Attributes:
        sizes: global size of each factor.
        operands: per tensor operand, per dim, its factors.
        results: per result, per dim, its factors.
        whole: factors that no axis may carry.
        reduction: what a factor that a result lacks leaves it owing.
        unaffected: (result number, factor): the result has nothing to do with the factor, which
            only other operands have; where it is carried every rank makes the result whole.
        addends: operands added beside a contraction (a bias): under a carried contraction they
            must be partial too, or they would count once per rank.
        linear: sets of operands in which the op is linear together; a partial sum passes through.
        apart: axes over which the first operand's terms of a partial sum are taken one by one.
        shape_args: (argument place, result number): sizes inside arguments that become local.
        count_args: (argument place, operand number, dim): an argument that is one operand's size.
        arguments: (arguments, local results) -> local arguments, where sizes stand in them in
            other ways than the two above.
        window: (factor, name): where the factor is carried, the op of that name runs in place of
            this one, with the factor's whole size and where each coordinate's part begins as its
            last arguments.
        plain: factors of which each rank's part is one run: what runs is told where that begins.
        beside: (axis, tensor, dim): where the axis carries a factor, dim `dim` of that tensor
            (operands first, then results) is split over it too, though it is another factor.
        halos: (factor, halo): dims that only the axis `context` may carry, in plain chunks; their
            sizes differ between operands and results.
        ring: the factor that only the axis `context` may carry, whose ranks then exchange what is
            split beside it (`program.ring`).
        known: False for the fallback of an op that has no rule.
    """

    sizes: tuple[int, ...]
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    whole: frozenset[int] = frozenset()
    reduction: Literal["sum", "max", "min"] = "sum"
    unaffected: frozenset[tuple[int, int]] = frozenset()
    addends: frozenset[int] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    apart: frozenset[str] = frozenset()
    shape_args: tuple[tuple[int, int], ...] = ()
    count_args: tuple[tuple[int, int, int], ...] = ()
    arguments: Localize | None = field(default=None, compare=False)
    window: tuple[int, str] | None = None
    plain: frozenset[int] = frozenset()
    beside: tuple[tuple[str, int, int], ...] = ()
    halos: tuple[tuple[int, Halo], ...] = ()
    ring: int | None = None
    known: bool = True


@dataclass(frozen=True, slots=True)
class Carry:
    """An axis carries `factor` of an op, seen as (outer, n, unit), n split in chunks."""

    factor: int
    outer: int = 1
    unit: int = 1


@dataclass(frozen=True, slots=True)
class OpView:
    """An op with the values it reads and makes: what a rule looks at."""

    op: Op
    operands: tuple[Value, ...]
    results: tuple[Value, ...]

    @classmethod
    def of(cls, op: Op, values: Sequence[Value]) -> OpView:
        """The view of `op` in a program with these values."""
        return cls(op, tuple(values[i] for i in op.inputs), tuple(values[i] for i in op.results))

    def arg(self, place: int, default: Arg = None) -> Arg:
        """Positional argument `place`, or the default where it was left out."""
        return self.op.args[place] if place < len(self.op.args) else default

    def number(self, place: int, default: int = 0) -> int:
        """Positional integer argument."""
        value = self.arg(place, default)
        assert isinstance(value, int), (self.op.name, place, value)
        return value

    def numbers(self, place: int) -> tuple[int, ...] | None:
        """Positional argument that is a list of integers, or None; one integer is a list of one."""
        value = self.arg(place)
        if value is None or isinstance(value, tuple):
            return value  # type: ignore[return-value]
        assert isinstance(value, int)
        return (value,)

    def dims(self, place: int, rank: int) -> tuple[int, ...]:
        """A list-of-dims argument made non-negative; all dims where it is missing or empty."""
        found = self.numbers(place)
        return tuple(dim % rank for dim in found) if found else tuple(range(rank))

    def place(self, arg: int) -> int | None:
        """The operand number of positional argument `arg`; None where it is no tensor."""
        if not isinstance(self.arg(arg), Ref):
            return None
        return sum(1 for _ in refs(self.op.args[:arg]))


RuleMaker = Callable[[OpView], Rule]

_T = TypeVar("_T")


def made(view: OpView, *each: _T) -> list[_T]:
    """Of what is said for each result, that for the used ones (an output mask leaves some out)."""
    return [one for one, out in zip(each, view.op.outputs, strict=False) if out is not None]


def whole(view: OpView, *, known: bool = True) -> Rule:
    """Every operand whole, every result whole: always right, and the fallback."""
    operands = tuple(((),) * len(value.shape) for value in view.operands)
    results = tuple(((),) * len(value.shape) for value in view.results)
    return Rule((), operands, results, known=known)


def einsum(
    view: OpView,
    operands: Sequence[str | None],
    results: Sequence[str | None],
    *,
    keep: str = "",
    addends: Sequence[int] = (),
    linear: Sequence[Sequence[int]] = (),
    shape_args: Sequence[tuple[int, int]] = (),
    reduction: Literal["sum", "max", "min"] = "sum",
) -> Rule:
    """A rule from patterns, one per tensor operand and result (None where it is not there).

    A pattern is space-separated letters, one per dim; `...` stands for leading dims, aligned right
    and broadcast; `1` for a dim that takes no part. `keep` lists letters that no axis may carry.
    """
    shapes = [value.shape for value in view.operands]
    made = [value.shape for value in view.results]
    left = [pattern for pattern in operands if pattern is not None]
    right = [pattern for pattern in results if pattern is not None]
    assert len(left) == len(shapes), (view.op.name, left, shapes)
    assert len(right) == len(made), (view.op.name, right, made)
    sizes: dict[str, int] = {}
    spelled = [_spell(p, len(shape)) for p, shape in zip(left + right, shapes + made, strict=True)]
    for letters, shape in zip(spelled, shapes + made, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            if letter != "1":
                sizes[letter] = max(sizes.get(letter, 1), size)
    order = {letter: place for place, letter in enumerate(sizes)}

    def dims(letters: list[str], shape: tuple[int, ...]) -> tuple[Dim, ...]:
        return tuple(
            (order[letter],) if letter != "1" and size == sizes[letter] and size > 1 else ()
            for letter, size in zip(letters, shape, strict=True)
        )

    count = len(left)
    kept = frozenset(order[letter] for letter in keep.split() if letter in order)
    return Rule(
        tuple(sizes.values()),
        tuple(dims(s, shape) for s, shape in zip(spelled[:count], shapes, strict=True)),
        tuple(dims(s, shape) for s, shape in zip(spelled[count:], made, strict=True)),
        whole=kept,
        reduction=reduction,
        addends=frozenset(addends),
        linear=tuple(frozenset(group) for group in linear),
        shape_args=tuple(shape_args),
    )


def _spell(pattern: str, rank: int) -> list[str]:
    letters = pattern.split()
    if "..." not in letters:
        assert len(letters) == rank, (pattern, rank)
        return letters
    place = letters.index("...")
    extra = rank - (len(letters) - 1)
    # Leading dims are named from the right, so that broadcasting aligns them.
    names = [f".{extra - k}" for k in range(extra)]
    return letters[:place] + names + letters[place + 1 :]


def shard_of(rule: Rule, dims: tuple[Dim, ...], carry: Carry) -> Shard | None:
    """The shard that a carried factor means for a tensor of these dims; None if it has it not."""
    for number, factors in enumerate(dims):
        if carry.factor in factors:
            place = factors.index(carry.factor)
            before = math.prod(rule.sizes[f] for f in factors[:place])
            after = math.prod(rule.sizes[f] for f in factors[place + 1 :])
            return Shard(number, before * carry.outer, after * carry.unit)
    return None


def placed(rule: Rule, tensor: int, axis: str, carry: Carry) -> Shard | None:
    """How a tensor of the op (operands first, then results) lies over an axis that carries this."""
    for name, other, dim in rule.beside:
        if (name, other) == (axis, tensor) and rule.ring in (None, carry.factor):
            return Shard(dim)
    return shard_of(rule, (*rule.operands, *rule.results)[tensor], carry)


def carry_of(rule: Rule, dims: tuple[Dim, ...], shard: Shard) -> Carry | None:
    """The factor that a shard of a tensor of these dims falls into; None if it cuts across."""
    factors = dims[shard.dim]
    size = math.prod(rule.sizes[f] for f in factors)
    if not factors or size % (shard.outer * shard.unit):
        return None
    before = 1
    for factor in factors:
        after = size // (before * rule.sizes[factor])
        if shard.outer % before == 0 and shard.unit % after == 0:
            carry = Carry(factor, shard.outer // before, shard.unit // after)
            if rule.sizes[factor] % (carry.outer * carry.unit) == 0:
                plain = carry == Carry(factor) or factor not in {*dict(rule.halos), *rule.plain}
                return carry if plain and factor not in rule.whole else None
        before *= rule.sizes[factor]
    return None
