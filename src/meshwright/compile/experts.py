"""Products of rows with the weights of the expert that each row was sent to, as ops.

Rows come in any order, any number for an expert: they are sorted here, multiplied group by group,
and put back. A row whose id names no expert is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["grouped_mm"]


@torch.library.custom_op("meshwright::expert_mm", mutates_args=())
def expert_mm(x: Tensor, ids: Tensor, weights: Tensor, routed: bool) -> Tensor:  # noqa: FBT001
    """x (s i), ids (s), weights (e i o) -> (s o): row k is x[k] @ weights[ids[k]].

    Args:
        x: rows.
        ids: the expert of each row.
        weights: of the experts.
        routed: its rows were brought to the ranks that hold their experts (only rules ask).
    """
    del routed
    order, groups = _groups(ids, weights.shape[0])
    sorted_ = x.index_select(0, order)
    made = x.new_zeros(x.shape[0], weights.shape[2])
    for expert, start, end in groups:
        torch.mm(sorted_[start:end], weights[expert], out=made[start:end])
    return torch.empty_like(made).index_copy_(0, order, made)


@expert_mm.register_fake
def _(x: Tensor, _ids: Tensor, weights: Tensor, _routed: bool) -> Tensor:  # noqa: FBT001
    return x.new_empty(x.shape[0], weights.shape[2])


@torch.library.custom_op("meshwright::expert_mm_weight", mutates_args=())
def expert_mm_weight(
    x: Tensor,
    gradient: Tensor,
    ids: Tensor,
    experts: int,
    routed: bool,  # noqa: FBT001
) -> Tensor:
    """x (s i), gradient (s o), ids (s) -> (e i o): of each expert, its rows' products added up."""
    del routed
    order, groups = _groups(ids, experts)
    rows, slopes = x.index_select(0, order), gradient.index_select(0, order)
    made = x.new_zeros(experts, x.shape[1], gradient.shape[1])
    for expert, start, end in groups:
        torch.mm(rows[start:end].t(), slopes[start:end], out=made[expert])
    return made


@expert_mm_weight.register_fake
def _(
    x: Tensor,
    gradient: Tensor,
    _ids: Tensor,
    experts: int,
    _routed: bool,  # noqa: FBT001
) -> Tensor:
    return x.new_empty(experts, x.shape[1], gradient.shape[1])


@torch.library.custom_op("meshwright::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    """torch's `_grouped_mm`, in any dtype.

    Rows x (s i) of groups that end at `offs`, times y (e i o) -> (s o); or x (i s), y (s o), the
    products of each group's -> (e i o).
    """
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    made = _empty(x, y, len(ends)).zero_()
    for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if y.dim() == 3:
            torch.mm(x[start:end], y[expert], out=made[start:end])
        else:
            torch.mm(x[:, start:end], y[start:end], out=made[expert])
    return made


def _empty(x: Tensor, y: Tensor, experts: int) -> Tensor:
    head = () if y.dim() == 3 else (experts,)
    return x.new_empty(*head, x.shape[0], y.shape[-1])


@grouped_mm.register_fake
def _(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    return _empty(x, y, offs.shape[0])


def _groups(ids: Tensor, experts: int) -> tuple[Tensor, Iterator[tuple[int, int, int]]]:
    """The order of rows by expert, and (expert, first, end) of each that has rows."""
    sorted_, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(sorted_, torch.arange(experts + 1, dtype=ids.dtype)).tolist()
    pairs = itertools.pairwise(ends)
    return order, ((k, start, end) for k, (start, end) in enumerate(pairs) if end > start)


@torch.library.custom_op("meshwright::dispatch", mutates_args=())
def dispatch(x: Tensor, ids: Tensor, experts: int) -> Tensor:
    """Rows x (s ...) of the experts `ids` (s); one device has all experts, so nothing moves."""
    del ids, experts
    return x.clone()


@dispatch.register_fake
def _(x: Tensor, _ids: Tensor, _experts: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("meshwright::combine", mutates_args=())
def combine(x: Tensor, ids: Tensor, experts: int) -> Tensor:
    """Rows back in the order in which they were dispatched."""
    del ids, experts
    return x.clone()


@combine.register_fake
def _(x: Tensor, _ids: Tensor, _experts: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("meshwright::dispatch_ids", mutates_args=())
def dispatch_ids(ids: Tensor, experts: int) -> Tensor:
    """The experts of rows that were dispatched."""
    del experts
    return ids.clone()


@dispatch_ids.register_fake
def _(ids: Tensor, _experts: int) -> Tensor:
    return torch.empty_like(ids)


@torch.library.custom_op("meshwright::expert_order", mutates_args=())
def expert_order(
    ids: Tensor, experts: int, shares: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a rank must know to send its rows to the ranks that hold their experts.

    Args:
        ids: the expert of each row.
        experts: that there are.
        shares: how many of them, in order, each rank holds.

    Returns:
        (order of rows by expert, its inverse, rows of each expert (1 e), rows for each rank).

    Raises:
        IndexError: an id is no expert's.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < experts:
        raise IndexError(f"a row is sent to an expert that is not among the {experts}")
    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    counts = torch.bincount(ids, minlength=experts)
    sent = torch.stack([part.sum() for part in counts.split(list(shares))])
    return order, inverse, counts.unsqueeze(0), sent


@expert_order.register_fake
def _(ids: Tensor, experts: int, shares: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = ids.new_empty(ids.shape, dtype=torch.int64)
    counts = order.new_empty(1, experts)
    return order, torch.empty_like(order), counts, order.new_empty(len(shares))


@torch.library.custom_op("meshwright::expert_ids", mutates_args=())
def expert_ids(counts: Tensor) -> Tensor:
    """counts (m e) of rows that m ranks sent, each sorted by expert -> the expert of each row."""
    members, experts = counts.shape
    return torch.arange(experts).repeat(members).repeat_interleave(counts.flatten())


@expert_ids.register_fake
def _(counts: Tensor) -> Tensor:
    rows = torch.library.get_ctx().new_dynamic_size()
    return counts.new_empty(rows)
