"""Lookups in a rank's window of a table whose rows are split, as ops that check their indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.program.program import Op

__all__ = ["WINDOWS", "window"]


@torch.library.custom_op("meshwright::classes", mutates_args=())
def classes(target: Tensor, count: int, ignored: int) -> Tensor:
    """Targets, looked at: each is a class below `count`, or the ignored one.

    Raises:
        IndexError: one is neither.
    """
    wrong = (target != ignored) & ((target < 0) | (target >= count))
    if wrong.any():
        found = int(target[wrong][0])
        raise IndexError(f"Target {found} is out of bounds.")
    return target.clone()


@classes.register_fake
def _(target: Tensor, *_: int) -> Tensor:
    return torch.empty_like(target)


@torch.library.custom_op("meshwright::embedding_window", mutates_args=())
def embedding_window(weight: Tensor, indices: Tensor, start: int, rows: int) -> Tensor:
    """Rows of the window of a table of `rows` that begins at `start`; zeros for indices elsewhere.

    Raises:
        IndexError: an index is no row of the whole table.
    """
    local, inside = _inside(indices, start, weight.shape[0])
    if not bool(inside.all()) and bool(((indices < 0) | (indices >= rows)).any()):
        raise IndexError("index out of range in self")
    found = F.embedding(local, weight)
    return found.masked_fill_(~inside.unsqueeze(-1), 0)


@embedding_window.register_fake
def _(weight: Tensor, indices: Tensor, *_: int) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


@torch.library.custom_op("meshwright::embedding_window_backward", mutates_args=())
def embedding_window_backward(
    gradient: Tensor, indices: Tensor, start: int, count: int, padding: int
) -> Tensor:
    """The gradient of a window of `count` rows; row `padding` of the whole table has none."""
    local, inside = _inside(indices, start, count)
    inside = inside & (indices != padding)
    aside = torch.where(inside, local, count)  # one row more, for all that lies elsewhere
    made: Tensor = torch.ops.aten.embedding_dense_backward(
        gradient, aside, count + 1, -1, scale_grad_by_freq=False
    )
    return made[:count].clone()


@embedding_window_backward.register_fake
def _(gradient: Tensor, indices: Tensor, start: int, count: int, padding: int) -> Tensor:
    del indices, start, padding
    return gradient.new_empty((count, gradient.shape[-1]))


@torch.library.custom_op("meshwright::overlap_add", mutates_args=())
def overlap_add(x: Tensor, dim: int, size: int, starts: list[int], lengths: list[int]) -> Tensor:
    """Parts that lie side by side along `dim`, added up where each starts in a dim of `size`."""
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    total = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]), dtype=wide)
    parts = x.split(lengths, dim)
    for part, start, length in zip(parts, starts, lengths, strict=True):
        total.narrow(dim, start, length).add_(part)
    return total.to(x.dtype)


@overlap_add.register_fake
def _(x: Tensor, dim: int, size: int, starts: list[int], lengths: list[int]) -> Tensor:
    del starts, lengths
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))


def _inside(indices: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Indices within the window, and which of them are in it; others are row 0."""
    local = indices - start
    inside = (local >= 0) & (local < count)
    return torch.where(inside, local, 0), inside


def _embedding(op: Op, start: int, weight: Tensor, indices: Tensor) -> Tensor:
    rows = op.args[-2]
    assert isinstance(rows, int)
    found: Tensor = embedding_window(weight, indices, start, rows)
    return found


def _embedding_backward(op: Op, start: int, gradient: Tensor, indices: Tensor) -> Tensor:
    count, padding = op.args[2], op.args[3]
    assert isinstance(count, int)
    assert isinstance(padding, int)
    found: Tensor = embedding_window_backward(gradient, indices, start, count, padding)
    return found


WINDOWS: Mapping[str, Callable[..., Tensor]] = {
    "meshwright.embedding_window": _embedding,
    "meshwright.embedding_window_backward": _embedding_backward,
}


def window(op: Op, coordinates: Mapping[str, int]) -> Callable[..., Tensor]:
    """What runs a window op on the rank at `coordinates`; its last argument says where each begins.

    Args:
        op: whose last argument is ((axis, start of each coordinate's rows), ...).
        coordinates: the rank's, by axis.
    """
    starts: Any = op.args[-1]
    start = sum(places[coordinates[axis]] for axis, places in starts)
    function = WINDOWS[op.base]

    def run(*tensors: Tensor) -> Tensor:
        return function(op, start, *tensors)

    return run
