"""The user's own layouts of parameters, by patterns of names: a plan's `layouts`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from meshwright.errors import PlanError, nearest
from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Shard
from meshwright.program.program import Value

__all__ = ["chosen_layouts"]


def chosen_layouts(
    patterns: Sequence[tuple[str, Sequence[str | None]]],
    parameters: Mapping[str, Value],
    axes: Sequence[Axis],
) -> dict[str, Layout]:
    """The layouts that a plan's `layouts` give, by parameter; of patterns the later one holds.

    Args:
        patterns: (pattern of names, as a shell's; the mesh axis of each dim or None).
        parameters: dtype and global shape by name.
        axes: of the mesh.

    Raises:
        PlanError: a pattern matches nothing, or what it says does not fit what it matches.
    """
    found: dict[str, Layout] = {}
    for pattern, dims in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise PlanError(
                f"layout {pattern!r} matches no parameter; {nearest(pattern, list(parameters))}"
            )
        _require_axes(pattern, dims)
        for name in names:
            _require_dims(pattern, dims, name, parameters[name].shape, axes)
            places = {axis: Shard(dim) for dim, axis in enumerate(dims) if axis is not None}
            sizes = {axis.name: axis.size for axis in axes}
            found[name] = Layout.of(axes, {a: p for a, p in places.items() if sizes[a] > 1})
    return found


def _require_axes(pattern: str, dims: Sequence[str | None]) -> None:
    for dim, axis in enumerate(dims):
        if axis is not None and axis in dims[:dim]:
            raise PlanError(
                f"layout {pattern!r} splits dims {dims.index(axis)} and {dim} over {axis}; an axis "
                "splits one dim of a tensor"
            )
        if axis in ("data", "pipeline"):
            raise PlanError(
                f"layout {pattern!r} splits dim {dim} over {axis}; weights rest split over data "
                "by zero=3, and pipeline is cut by `cuts`"
            )


def _require_dims(
    pattern: str,
    dims: Sequence[str | None],
    name: str,
    shape: tuple[int, ...],
    axes: Sequence[Axis],
) -> None:
    if len(dims) != len(shape):
        raise PlanError(
            f"layout {pattern!r} names {len(dims)} dims, but {name} has {len(shape)}: "
            f"{list(shape)}; give an axis or none for each"
        )
    for axis in axes:
        if axis.name in dims and shape[dims.index(axis.name)] < axis.size:
            dim = dims.index(axis.name)
            raise PlanError(
                f"layout {pattern!r} splits dim {dim} of {name} over {axis.name}={axis.size}, but "
                f"it has {shape[dim]} elements; use {axis.name}={shape[dim]} or fewer"
            )
