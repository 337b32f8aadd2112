"""Ops that choose by value, taken apart into ones whose parts can be split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["BY_VALUE"]

aten = torch.ops.aten


def _any(x: Tensor, dims: Sequence[int] | int | None = None, keepdim: bool = False) -> Tensor:
    """Whether some is true: how many there are, which ranks can add up."""
    return _count(x != 0, dims, keepdim) > 0


def _all(x: Tensor, dims: Sequence[int] | int | None = None, keepdim: bool = False) -> Tensor:
    return _count(x == 0, dims, keepdim) == 0


def _count(x: Tensor, dims: Sequence[int] | int | None, keepdim: bool) -> Tensor:
    found = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else dims
    return x.sum(list(found), keepdim) if x.dim() else x.long()


def _max(x: Tensor) -> Tensor:
    return aten.amax.default(x, list(range(x.dim())))  # type: ignore[no-any-return]


def _min(x: Tensor) -> Tensor:
    return aten.amin.default(x, list(range(x.dim())))  # type: ignore[no-any-return]


def _rows(mask: Tensor, x: Tensor, count: int) -> tuple[Tensor, int]:
    """(which rows of `x` a mask takes, their width); single elements where it cuts rows."""
    width = x.shape[-1] if x.dim() else 1
    wide = mask.dim() > 0 and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    if wide and x.dim() > 1 and width and count % width == 0:
        return mask[..., 0].expand(x.shape[:-1]), width
    return mask.expand(x.shape), 1


def _places(taken: Tensor) -> Tensor:
    """For each place of a mask, how many it takes before it."""
    return (taken.reshape(-1).cumsum(0) - 1).clamp(min=0).reshape(taken.shape)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The places that a mask takes, filled in order from `source`: a lookup in its rows."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    x = x.expand(shape)
    taken, width = _rows(mask, x, source.numel())
    given = source.reshape(-1, width)
    picked = aten.index.Tensor(given, [_places(taken)]).reshape(shape)
    return torch.where(mask, picked, x)


def _masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """The gradient of `source`: what each of its rows was written to."""
    count = 1
    for size in sizes:
        count *= int(size)
    taken, width = _rows(mask, grad, count)
    given = torch.where(mask, grad, 0).reshape(*taken.shape, width)
    rows = grad.new_zeros(count // width, width)
    added = aten.index_put.default(rows, [_places(taken)], given, True)
    return added.reshape(list(sizes))  # type: ignore[no-any-return]


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """A sum, or a sum and a count; the largest and the product stay as they are."""
    if reduce not in ("sum", "mean") or not x.is_floating_point() or x.dim() == 0:
        return NotImplemented
    ones = torch.ones_like(source)
    count = aten.scatter_add.default(torch.zeros_like(x), dim, index, ones)
    base = x if include_self else torch.where(count > 0, 0, x)
    total = aten.scatter_add.default(base, dim, index, source)
    if reduce == "sum":
        return total
    return total / (count + 1 if include_self else count.clamp(min=1))


BY_VALUE: dict[Any, Any] = {
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
    aten.all.default: _all,
    aten.all.dim: _all,
    aten.all.dims: _all,
    aten._is_all_true.default: _all,
    aten._is_any_true.default: _any,
    aten.max.default: _max,
    aten.min.default: _min,
    aten.masked_scatter.default: _masked_scatter,
    aten.masked_scatter_backward.default: _masked_scatter_backward,
    aten.scatter_reduce.two: _scatter_reduce,
}
"""aten op -> torch function."""
