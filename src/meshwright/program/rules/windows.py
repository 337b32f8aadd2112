"""Windows over space: which dims of convolutions and pooling may be split, with what halos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshwright.program.rules.factor import Dim, Halo, OpView, Rule

__all__ = ["Windows", "blocked", "windowed"]


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of an op on (samples, channels, space ...).

    Attributes:
        kernel: sizes, per dim of space.
        stride: place of the argument; one that is left out is the kernel's sizes.
        padding: place of the argument.
        dilation: place of the argument, or None for an op that has none.
        backward: whether its operands are the gradient, and then what the windows read.
        counts: whether it has a tensor of positions in the plane: its second output, or the last
            operand of the op's backward.
        fill: of the padding.
    """

    kernel: tuple[int, ...]
    stride: int
    padding: int
    dilation: int | None = None
    backward: bool = False
    counts: bool = False
    fill: float = 0.0


def windowed(
    view: OpView, rule: Rule, windows: Windows, reads: Sequence[int], makes: Sequence[int]
) -> Rule:
    """The rule with a factor for every dim of space that has more than one row.

    Args:
        view: of the op.
        rule: in which space is whole.
        windows: of the op.
        reads: operands that have the dims.
        makes: results that have the dims.
    """
    operands, results = list(rule.operands), list(rule.results)
    sizes, halos = list(rule.sizes), []
    for halo in _halos(view, windows):
        shapes = [view.operands[k].shape for k in reads] + [view.results[k].shape for k in makes]
        size = min(shape[halo.dim] for shape in shapes)
        if size < 2:
            continue
        factor = len(sizes)
        sizes.append(size)
        halos.append((factor, halo))
        for tensors, places in ((operands, reads), (results, makes)):
            for place in places:
                tensors[place] = _with(tensors[place], halo.dim, (factor,))
    return replace(
        rule, sizes=tuple(sizes), operands=tuple(operands), results=tuple(results),
        halos=tuple(halos),
    )  # fmt: skip


def _with(dims: tuple[Dim, ...], dim: int, factors: Dim) -> tuple[Dim, ...]:
    return (*dims[:dim], factors, *dims[dim + 1 :])


def _halos(view: OpView, windows: Windows) -> list[Halo]:
    """Of each dim of space, if its arguments are given per dim."""
    read = view.operands[1 if windows.backward else 0].shape
    space = len(read) - 2

    def each(place: int | None, missing: tuple[int, ...]) -> tuple[int, ...]:
        return (view.numbers(place) if place is not None else None) or missing

    kernel = windows.kernel
    stride = each(windows.stride, kernel)
    padding = each(windows.padding, (0,) * space)
    dilation = each(windows.dilation, (1,) * space)
    if any(len(found) != space for found in (kernel, stride, padding, dilation)):
        return []
    positions = None if not windows.counts else 2 if windows.backward else 1
    found = []
    for k in range(space):
        if windows.counts and any(size > 1 for size in read[2 : 2 + k]):
            break  # positions of such columns are not those of a plane less some rows
        found.append(
            Halo(
                k + 2,
                dilation[k] * (kernel[k] - 1) + 1,
                stride[k],
                padding[k],
                windows.padding,
                1 if windows.backward else 0,
                0 if windows.backward else None,
                windows.fill,
                positions,
                read[-1] if k < space - 1 else 1,
            )
        )
    return found


def blocked(
    view: OpView,
    rule: Rule,
    small: tuple[Sequence[int], Sequence[int]],
    large: tuple[Sequence[int], Sequence[int]],
) -> Rule:
    """The rule where each row of some tensors is a block of rows of others: enlarged images.

    Args:
        view: of the op.
        rule: in which space is whole.
        small: (operands, results) that have the rows.
        large: (operands, results) that have blocks in place of them.
    """

    def shapes(places: tuple[Sequence[int], Sequence[int]]) -> list[tuple[int, ...]]:
        return [view.operands[k].shape for k in places[0]] + [
            view.results[k].shape for k in places[1]
        ]

    operands, results, sizes = list(rule.operands), list(rule.results), list(rule.sizes)
    rows, wide = shapes(small)[0], shapes(large)[0]
    kept = set(rule.whole)
    for dim in range(2, len(rows)):
        if rows[dim] < 2 or wide[dim] % rows[dim]:
            continue
        row, block = len(sizes), len(sizes) + 1
        times = wide[dim] // rows[dim]
        sizes += [rows[dim], times]
        kept.add(block)
        for places, factors in ((small, (row,)), (large, (row, block) if times > 1 else (row,))):
            for tensors, some in ((operands, places[0]), (results, places[1])):
                for place in some:
                    tensors[place] = _with(tensors[place], dim, factors)
    return replace(
        rule, sizes=tuple(sizes), operands=tuple(operands), results=tuple(results),
        whole=frozenset(kept),
    )  # fmt: skip
