"""Attention with dropout, for which torch has no fused kernel on CPU, in as few passes as can be.

torch's own way out computes the half of the scores that a causal mask throws away, looks for rows
that are masked whole, widens the mask and divides it. Here the rows go in blocks, each as wide as
the mask lets it look; the draw is that of torch's way, so the reference of `verify` has the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["Attention"]

_softmax_backward = torch.ops.aten._softmax_backward_data.default
_BLOCKS = 4
_SMALLEST = 32  # rows of a block


class Attention(TorchFunctionMode):
    """`scaled_dot_product_attention` with dropout, and without a mask given, is ours under it."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            asked = _asked(*args, **kwargs)
            if asked is not None:
                return self._attend(asked)
        return func(*args, **kwargs)

    def _attend(self, asked: _Asked) -> Tensor:
        query, key, value = asked.cast()
        *lead, rows, width = query.shape
        columns = key.shape[-2]
        causal = self._mask(rows, query.dtype) if asked.causal else None
        with torch.autocast("cpu", enabled=False):
            mask = query.new_empty(*lead, rows, columns).bernoulli_(1 - asked.p)
            flat = (t.reshape(-1, *t.shape[-2:]) for t in (query, key, value, mask))
            scale = 1 / math.sqrt(width) if asked.scale is None else asked.scale
            found = _Attend.apply(*flat, causal, scale, 1 / (1 - asked.p))  # type: ignore[no-untyped-call]
        return found.reshape(*lead, rows, value.shape[-1])  # type: ignore[no-any-return]

    def _mask(self, rows: int, dtype: torch.dtype) -> Tensor:
        """What is added to a square of scores: minus infinity where a column is still to come."""
        size = _height(rows)
        key = (size, size, dtype)
        if key not in self.masks:
            self.masks[key] = torch.full((size, size), -math.inf, dtype=dtype).triu(1)
        return self.masks[key]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A call that is ours to answer."""

    query: Tensor
    key: Tensor
    value: Tensor
    p: float
    causal: bool
    scale: float | None

    def cast(self) -> tuple[Tensor, Tensor, Tensor]:
        """The operands, in autocast's dtype where it is on."""
        operands = self.query, self.key, self.value
        if not torch.is_autocast_enabled("cpu"):
            return operands
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) for t in operands)
        return query, key, value


def _asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - torch's signature
    **more: Any,
) -> _Asked | None:
    """None where torch's own way is to answer."""
    plain = attn_mask is None and not more.get("enable_gqa")
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    square = not is_causal or query.shape[-2] == key.shape[-2]
    if 0 < dropout_p < 1 and plain and alike and square and query.dim() > 2:
        return _Asked(query, key, value, dropout_p, is_causal, more.get("scale"))
    return None


def _height(rows: int) -> int:
    """Of a block of rows; the last one may be lower."""
    return max(-(-rows // _BLOCKS), min(rows, _SMALLEST))


def _cuts(rows: int, columns: int, *, causal: bool) -> list[tuple[int, int, int]]:
    """(first row, end, columns that it looks at) of each block."""
    if not causal:
        return [(0, rows, columns)]
    height = _height(rows)
    ends = [(first, min(first + height, rows)) for first in range(0, rows, height)]
    return [(first, end, end) for first, end in ends]


class _Attend(torch.autograd.Function):
    """dropout(softmax(q k^T scale + causal)) v, over (batch, rows, width); `mask` is 0 or 1."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        causal: Tensor | None,
        scale: float,
        spread: float,
    ) -> Tensor:
        cuts = _cuts(query.shape[1], key.shape[1], causal=causal is not None)
        shares, found = [], []
        for first, end, width in cuts:
            scores = torch.bmm(query[:, first:end] * scale, key[:, :width].transpose(1, 2))
            if causal is not None:
                square = scores[..., first:] + causal[: end - first, : end - first]
                scores = torch.cat([scores[..., :first], square], -1) if first else square
            share = torch.softmax(scores, -1)
            shares.append(share)
            found.append(torch.bmm(share * mask[:, first:end, :width], value[:, :width]))
        ctx.save_for_backward(query, key, value, mask, *shares)
        ctx.how = cuts, scale, spread
        return torch.cat(found, 1) * spread if len(found) > 1 else found[0] * spread

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, mask, *shares = ctx.saved_tensors
        cuts, scale, spread = ctx.how
        gradient = gradient * spread
        dq, dk, dv = [], None, None
        for (first, end, width), share in reversed(list(zip(cuts, shares, strict=True))):
            kept, rows = mask[:, first:end, :width], gradient[:, first:end]
            dv = _added(dv, torch.bmm((share * kept).transpose(1, 2), rows))
            slope = torch.bmm(rows, value[:, :width].transpose(1, 2)) * kept
            slope = _softmax_backward(slope, share, -1, share.dtype)
            dq.append(torch.bmm(slope, key[:, :width]))
            dk = _added(dk, torch.bmm(slope.transpose(1, 2), query[:, first:end]))
        assert dk is not None
        return torch.cat(dq[::-1], 1) * scale, dk * scale, dv, None, None, None, None


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """`part` added to the first rows of `total`."""
    if total is None:
        return part
    rows = part.shape[1]
    return torch.cat([total[:, :rows] + part, total[:, rows:]], 1)
