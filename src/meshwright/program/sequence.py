"""Sequence parallelism: what `tensor` leaves whole is split over it along the sequence.

Under `tensor` alone every rank normalises, drops and adds the same activations between one row-
parallel weight and the next column-parallel one. Split along the sequence each does its share, and
keeps its share for the backward pass; an all-reduce becomes a reduce-scatter and an all-gather,
which move as many bytes (Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.errors import PlanError
from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Shard
from meshwright.program.program import Op, Program
from meshwright.program.propagate import Completed, propagate
from meshwright.program.rules import Carry, Rule, shard_of

__all__ = ["along_sequences"]

_AXIS = "tensor"


def along_sequences(
    program: Program,
    axes: Sequence[Axis],
    completed: Completed,
    pinned: Mapping[int, Layout],
    stored: Mapping[int, Layout],
) -> Completed:
    """`completed`, whose ops without a factor on `tensor` carry the sequence there.

    A second completion, in which `tensor` splits tokens and no weight, tells which factor that is.

    Args:
        program: with global shapes.
        axes: of the mesh.
        completed: the program as `tensor` splits its weights.
        pinned: as `propagate` takes it.
        stored: as `propagate` takes it.

    Raises:
        PlanError: no leaf of the batch counts tokens.
    """
    size = next(axis.size for axis in axes if axis.name == _AXIS)
    tokens = {
        value: pinned[value].change(axes, _AXIS, Shard(1)) for value in _tokens(program, size)
    }
    if not tokens:
        raise PlanError(
            f"plan asks for sequence={_AXIS}, but no tensor of the batch is a table of integers "
            f"(samples, tokens) with {size} tokens or more; drop sequence"
        )
    others = {value: _without(layout) for value, layout in pinned.items()}
    along = propagate(program, axes, others | tokens, stored)
    least = max(program.values[value].elements for value in tokens)
    found = _candidates(program, completed, along, least)
    found = _read_along(program, completed, _owing(program, completed, found))
    return _merged(program, completed, found)


def _tokens(program: Program, size: int) -> list[int]:
    return [
        value
        for name, value in program.inputs
        if name.startswith("batch/")
        and "int" in program.values[value].dtype
        and len(program.values[value].shape) > 1
        and program.values[value].shape[1] >= size
    ]


def _without(layout: Layout) -> Layout:
    return Layout(tuple((name, place) for name, place in layout.placements if name != _AXIS))


def _merged(program: Program, first: Completed, found: Mapping[int, Carry]) -> Completed:
    """`first`, whose ops carry what was found beside."""
    carried, places = list(first.carried), dict(first.places.get(_AXIS, {}))
    for number, carry in found.items():
        carried[number] = (*carried[number], (_AXIS, carry))
        op, rule = program.ops[number], first.rules[number]
        for value, dims in zip(op.results, rule.results, strict=True):
            places[value] = shard_of(rule, dims, carry)
    return replace(first, carried=tuple(carried), places={**first.places, _AXIS: places})


def _candidates(
    program: Program, first: Completed, second: Completed, least: int
) -> dict[int, Carry]:
    """The sequence's factor of ops without one over `tensor`: of those that compute activations.

    What no weight is in (masks, positions) is cheap to make whole, and so is what has one number
    for a token, `least` numbers, unless it comes along the sequence.
    """
    activations = {value for name, value in program.inputs if name.startswith("model/")}
    found: dict[int, Carry] = {}
    along: set[int] = set()
    for number, op in enumerate(program.ops):
        if activations.isdisjoint(op.inputs):
            continue
        activations.update(op.results)
        carry = dict(second.carried[number]).get(_AXIS)
        size = max(program.values[value].elements for value in (*op.inputs, *op.results))
        worth = size > least or not along.isdisjoint(op.inputs)
        if carry is not None and worth and _AXIS not in dict(first.carried[number]):
            found[number] = carry
            along.update(op.results)
    return found


def _owing(program: Program, first: Completed, found: Mapping[int, Carry]) -> dict[int, Carry]:
    """`found` without the ops that only add up, or view, what comes as partial sums.

    So that sums which meet are paid for at once.
    """
    owing: set[int] = set()
    kept: dict[int, Carry] = {}
    for number, op in enumerate(program.ops):
        rule, carry = first.rules[number], dict(first.carried[number]).get(_AXIS)
        together = carry is None and (_views(program, op, rule) or _adds(op, rule))
        if together and owing.issuperset(op.inputs):
            owing.update(op.results)
            continue
        if number in found or carry is not None:
            owing.difference_update(op.inputs)  # paid for here, and once is enough
        if carry is not None:
            dims = zip(op.results, rule.results, strict=True)
            owing |= {value for value, d in dims if shard_of(rule, d, carry) is None}
        elif number in found:
            kept[number] = found[number]
    return kept


def _read_along(program: Program, first: Completed, found: Mapping[int, Carry]) -> dict[int, Carry]:
    """`found` without views that nobody reads along the sequence.

    So that what several views are made of is gathered once.
    """
    readers, kept = program.readers(), dict(found)
    given = {value for _, value in program.outputs}
    for number in sorted(found, reverse=True):
        op = program.ops[number]
        along = any(reader in kept for value in op.results for reader in readers.get(value, ()))
        if _views(program, op, first.rules[number]) and not along and given.isdisjoint(op.results):
            del kept[number]
    return kept


def _views(program: Program, op: Op, rule: Rule) -> bool:
    """Whether the op makes of one operand as many numbers, linearly."""
    if len(op.inputs) != 1 or len(op.results) != 1 or not rule.linear:
        return False
    operand, result = (program.values[value] for value in (*op.inputs, *op.results))
    return operand.elements == result.elements


def _adds(op: Op, rule: Rule) -> bool:
    """Whether the op is linear in all its operands together."""
    return frozenset(range(len(op.inputs))) in rule.linear
