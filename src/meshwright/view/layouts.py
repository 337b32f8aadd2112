"""Which part of the parameters a rank holds, read off the layouts' text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from meshwright.view.runfile import Axis, Parameter, Rank

__all__ = ["KINDS", "held", "layout_of", "rank_names", "shards"]

KINDS = ("weights", "gradients", "optimizer")

_SHARDED = re.compile(r"sharded\([^)]*\) over (\w+)")


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
    for axis in _SHARDED.findall(layout):
        parts *= max(1, sizes.get(axis, 1))
    return parts


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
    for axis in _SHARDED.findall(layout):
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
