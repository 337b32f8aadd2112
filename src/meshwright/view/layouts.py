"""Which part of a tensor a rank holds, read off the layouts' text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from meshwright.view.runfile import Axis, Parameter, Rank

__all__ = [
    "KINDS", "change", "dims_of", "held", "layout_of", "owed", "placements", "rank_names", "shards",
]  # fmt: skip

KINDS = ("weights", "gradients", "optimizer")

_PLACED = re.compile(r"(sharded|partial|fused)\((\w+)(?:[^()]|\([^()]*\))*\) over (\w+)")
_PART = re.compile(r"(\d+):(\d+) (whole|sharded)")


def layout_of(parameter: Parameter, kind: str) -> str:
    """The layout of the parameter's weights, gradients or optimizer state."""
    layouts = {
        "weights": parameter.weights,
        "gradients": parameter.gradients,
        "optimizer": parameter.optimizer,
    }
    return layouts[kind]


def shards(layout: str, axes: Sequence[Axis]) -> int:
    """Into how many parts `layout` cuts a tensor: 1 is whole on each rank, 0 not held at all.

    >>> shards("sharded(0) over data", [("data", 4)]), shards("replicated", [("data", 4)])
    (4, 1)
    """
    if layout in ("", "none"):
        return 0
    sizes = dict(axes)
    parts = 1
    for kind, _, axis in placements(layout):
        parts *= max(1, sizes.get(axis, 1)) if kind == "sharded" else 1
    return parts


def placements(layout: str) -> tuple[tuple[str, str, str], ...]:
    """(`sharded`, `fused` or `partial`, the dim or the reduction, the axis) of each axis.

    >>> placements("partial(sum) over data, sharded(0 in (3, n, 64)) over tensor")
    (('partial', 'sum', 'data'), ('sharded', '0', 'tensor'))
    """
    return tuple(match.groups() for match in _PLACED.finditer(layout))  # type: ignore[misc]


def dims_of(shape: Sequence[int], layout: str) -> tuple[str, ...]:
    """Each dim of a tensor with the axes that split it.

    >>> dims_of((512, 128), "sharded(0) over tensor, sharded(1) over data")
    ('512/tensor', '128/data')
    >>> dims_of((48, 32), "fused(0: 0:32 sharded; 32:48 whole) over tensor")
    ('32/tensor+16', '32')
    """
    return tuple(_dim(dim, size, layout) for dim, size in enumerate(shape))


def _dim(dim: int, size: int, layout: str) -> str:
    found = [(kind, axis) for kind, d, axis in placements(layout) if d == str(dim)]
    for kind, axis in found:
        if kind == "fused":
            parts = {"whole": 0, "sharded": 0}
            for start, stop, how in _PART.findall(layout):
                parts[how] += int(stop) - int(start)
            return f"{parts['sharded']}/{axis}" + f"+{parts['whole']}" * bool(parts["whole"])
    return "/".join([f"{size}", *(axis for kind, axis in found if kind == "sharded")])


def owed(layout: str) -> tuple[str, ...]:
    """The axes over which a layout still owes a reduction."""
    return tuple(axis for kind, _, axis in placements(layout) if kind == "partial")


def change(why: str, axis: str) -> str:
    """What a collective over `axis` changes; a reason in other words stays as it is.

    >>> change("sharded(0) over data, partial(sum) over tensor -> sharded(0) over data", "tensor")
    'partial → whole'
    """
    sides = [{a: (kind, d) for kind, d, a in placements(side)} for side in why.split(" -> ")]
    if len(sides) != 2 or not any(axis in side for side in sides):
        return why
    return " → ".join(_place(side.get(axis)) for side in sides)


def _place(found: tuple[str, str] | None) -> str:
    if found is None:
        return "whole"
    kind, what = found
    if kind != "partial":
        return f"dim {what}"
    return "partial" if what == "sum" else f"partial {what}"


def held(
    parameters: Sequence[Parameter], kind: str, rank: Rank, axes: Sequence[Axis]
) -> tuple[tuple[float, float], ...]:
    """The parts of all parameters, laid end to end as [0, 1], that `rank` holds of `kind`."""
    sizes: dict[str, int] = {}
    for parameter in parameters:
        layout = layout_of(parameter, kind)
        sizes[layout] = sizes.get(layout, 0) + parameter.bytes
    total = sum(sizes.values()) or 1
    coordinates = dict(rank.coordinates)
    result, start = [], 0.0
    for layout, size in sorted(sizes.items(), key=lambda item: -item[1]):
        length, count = size / total, shards(layout, axes)
        if count:
            at = _index(layout, coordinates, dict(axes))
            result.append((start + length * at / count, start + length * (at + 1) / count))
        start += length
    return tuple(result)


def _index(layout: str, coordinates: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Which of the layout's parts the coordinates pick, the first axis slowest."""
    index = 0
    for kind, _, axis in placements(layout):
        if kind == "sharded":
            index = index * max(1, sizes.get(axis, 1)) + coordinates.get(axis, 0)
    return index


def rank_names(ranks: Sequence[int]) -> str:
    """Ranks as ranges.

    >>> rank_names([0]), rank_names([0, 1, 2, 5])
    ('rank 0', 'ranks 0–2, 5')
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"
