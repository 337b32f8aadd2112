"""`as_strided` and its scatter as views and lookups of a tensor's own dims.

They address memory, and a shard's memory is another: windows cut by strides (sliding attention)
would read other elements. While tracing, strides are known; each becomes a lookup along what they
mix, and leading dims that they leave alone stay dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECOMPOSITIONS", "dense"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Form:
    """How strides address a tensor.

    Attributes:
        order: the tensor's dims as they lie in memory, slowest first.
        kept: for each of the slowest dims that are left alone, which dim of the outcome it is.
        start, rest: of the remaining memory, where the first element is; the outcome's other dims.
    """

    order: tuple[int, ...]
    kept: tuple[int, ...]
    start: int
    rest: tuple[int, ...]


def _form(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> _Form | None:
    """None where memory is addressed that is not the tensor's, or all of it in order (a view)."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (x.shape[d] == 1, -strides[d]))
    shape = [x.shape[d] for d in order]
    if not dense(shape, [strides[d] for d in order]):
        return None
    start = 0 if offset is None else offset - int(x.storage_offset())
    reach = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if start < 0 or reach >= x.numel():
        return None
    if x.is_contiguous() and start == 0 and dense(size, stride) and reach == x.numel() - 1:
        return None
    kept: list[int] = []
    block = x.numel()
    for n in shape:
        block //= n
        same = [
            d
            for d in range(len(size))
            if d not in kept and (size[d], stride[d]) == (n, block) and n > 1
        ]
        reach -= (n - 1) * block if same else 0
        if not same or reach >= block:
            break
        kept.append(same[0])
    rest = tuple(d for d in range(len(size)) if d not in kept)
    return _Form(tuple(order), tuple(kept), start, rest)


def dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie one after the other, whatever is said of dims of size one."""
    expected = 1
    for size, stride in reversed(list(zip(shape, strides, strict=True))):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _places(form: _Form, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Which element of the remaining memory each of the outcome's other dims' elements is."""
    found = torch.full((), form.start, dtype=torch.int64)
    for d in form.rest:
        found = found.unsqueeze(-1) + torch.arange(size[d]) * stride[d]
    return found.reshape(-1)


def _in_memory(x: Tensor, form: _Form) -> Tensor:
    """The tensor as (dims that are kept ..., the rest of memory)."""
    lies = x.permute(form.order)
    return lies.reshape([*lies.shape[: len(form.kept)], -1])


def _as_strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    if 0 in size:
        return x.new_zeros(size)
    form = _form(x, size, stride, offset)
    if form is None:
        return NotImplemented
    found = _in_memory(x, form).index_select(-1, _places(form, size, stride))
    order = (*form.kept, *form.rest)
    found = found.reshape([size[d] for d in order])
    return found.permute([order.index(d) for d in range(len(size))])


def _as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    form = _form(x, size, stride, offset)
    if form is None:
        return NotImplemented
    order = (*form.kept, *form.rest)
    lies, given = _in_memory(x, form), source.permute(order)
    given = given.reshape([*lies.shape[:-1], -1])
    lies = lies.index_copy(-1, _places(form, size, stride), given)
    lies = lies.reshape([x.shape[d] for d in form.order])
    return lies.permute([form.order.index(d) for d in range(x.dim())])


DECOMPOSITIONS: dict[Any, Any] = {
    aten.as_strided.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
}
"""As `decompose.DECOMPOSITIONS`."""
