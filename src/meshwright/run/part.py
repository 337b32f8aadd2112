"""A rank's part of a whole tensor, and where its boxes lie in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Bounds, Layout, local_shape, pieces, slab

__all__ = ["box", "finer", "part_of"]


def box(tensor: Tensor, bounds: Bounds) -> Tensor:
    """The part of `tensor` within (start, length) bounds, a view."""
    for dim, (start, length) in enumerate(bounds):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def part_of(
    whole: Tensor, layout: Layout, axes: Sequence[Axis], coordinates: Mapping[str, int]
) -> Tensor:
    """What a rank holds of `whole`: a view where that is one box, else its boxes side by side."""
    shape = tuple(whole.shape)
    found = list(pieces(shape, layout, axes, coordinates))
    if len(found) == 1:
        return box(whole, found[0][0])
    part = torch.empty(local_shape(shape, layout, axes, coordinates), dtype=whole.dtype)
    for there, here in found:
        box(part, here).copy_(box(whole, there))
    return part


def finer(
    part: Tensor,
    shape: tuple[int, ...],
    coarse: Layout,
    fine: Layout,
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
) -> Tensor:
    """The view of a rank's part under `coarse` that `fine`, which splits more, leaves it."""
    here = coarse
    for axis in axes:
        shard = fine.on(axis.name)
        if shard is None or here.on(axis.name) == shard:
            continue
        here = here.change(axes, axis.name, shard)
        lies = slab(shape, here, axes, coordinates, axis.name, shard)  # type: ignore[arg-type]
        assert lies.outer == 1, "what is updated in place is one box of what rests"
        index = coordinates[axis.name]
        start, length = lies.starts[index] * lies.unit, lies.lengths[index] * lies.unit
        part = part.narrow(lies.dim, start, length)
    return part
