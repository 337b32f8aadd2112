"""Ring attention's steps as ops: local queries meet one block of keys and values at a time.

A step merges what it finds with what the steps before found, by the log-sum-exp of each row; in the
backward pass that of the whole row makes each block's gradient exact (Liu et al. 2023; Dao 2022).
What accumulates over steps is kept in float32 or wider.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ring_attention", "ring_attention_backward", "ring_step", "ring_step_backward"]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default  # noqa: SLF001


@torch.library.custom_op("meshwright::ring_attention", mutates_args=())
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - as torch's op
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention where sequences are whole: torch's op."""
    found: tuple[Tensor, Tensor] = _forward(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return found


@ring_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
    dtype = _wide(query.dtype)
    return query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(
        query.shape[:-1], dtype=dtype
    )


@torch.library.custom_op("meshwright::ring_attention_backward", mutates_args=())
def ring_attention_backward(  # noqa: PLR0913 - an op takes all it reads
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,  # noqa: FBT001 - as torch's op
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients."""
    operands = (gradient, query, key, value, out, logsumexp)
    found: tuple[Tensor, Tensor, Tensor] = _backward(
        *operands, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return found


@ring_attention_backward.register_fake
def _(
    _gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("meshwright::ring_step", mutates_args=())
def ring_step(  # noqa: PLR0913 - an op takes all it reads
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    sees: str,
    start: int,
    before: int,
    last: bool,  # noqa: FBT001 - ops take no keyword here
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """One block more.

    Args:
        query: all that this rank has.
        key: a block of them.
        value: theirs.
        out: of the blocks before.
        logsumexp: of each row over the blocks before; minus infinity where it saw nothing.
        sees: `all` of the block, `causal`: up to its own place, or `none`.
        start: of the block, along the mask's columns.
        before: how many keys there were in the blocks before.
        last: there is no block to come.
        attn_mask: to be added to the scores of all keys.
        scale: of the scores.
    """
    if sees != "none":
        mask = _columns(attn_mask, start, key)
        made, found = _forward(
            query, key, value, 0.0, sees == "causal", attn_mask=mask, scale=scale
        )
        made = made.to(found.dtype)
        if mask is not None:
            found = found.masked_fill((mask == -math.inf).all(-1), -math.inf)
        if out is not None and logsumexp is not None:
            made, found = _merged((out, logsumexp, before), (made, found, key.shape[2]))
    else:
        assert out is not None
        assert logsumexp is not None
        made, found = out.clone(), logsumexp.clone()
    if last:  # rows that see nothing are zero, as torch's op leaves them
        made, found = made.to(query.dtype), found.masked_fill(found == -math.inf, 0.0)
    return made, found


@ring_step.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    wide = _wide(query.dtype)
    shape = (*query.shape[:-1], value.shape[-1])
    made = query.new_empty(shape, dtype=query.dtype if rest[5] else wide)
    return made, query.new_empty(query.shape[:-1], dtype=wide)


_Found = tuple[Tensor, Tensor, int]
"""(output, log-sum-exp of each row, keys)."""


def _merged(a: _Found, b: _Found) -> tuple[Tensor, Tensor]:
    """Of two sets of keys, that of both.

    A row masked by a dtype's least number has lost how many scores were summed; all its keys count
    alike.
    """
    top = torch.maximum(a[1], b[1])
    masked = top < torch.finfo(top.dtype).min / 2

    def weight(found: _Found) -> Tensor:
        plain = (found[1] - top).exp()
        alike = (found[1] > -math.inf).to(top.dtype) * found[2]
        return torch.where(masked, alike, plain)

    mine, other = weight(a), weight(b)
    total = mine + other
    parts = total.masked_fill(total == 0, 1.0)
    out = a[0] * (mine / parts).unsqueeze(-1) + b[0] * (other / parts).unsqueeze(-1)
    return out, torch.where(masked, top, top + parts.log())


@torch.library.custom_op("meshwright::ring_step_backward", mutates_args=())
def ring_step_backward(  # noqa: PLR0913 - an op takes all it reads
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    of_query: Tensor | None,
    of_key: Tensor | None,
    of_value: Tensor | None,
    sees: str,
    start: int,
    last: bool,  # noqa: FBT001 - ops take no keyword here
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's share of the gradients, added to what was found of them before.

    Args:
        gradient: of the output.
        query: all that this rank has.
        key: a block of them.
        value: theirs.
        out: whole.
        logsumexp: of whole rows.
        of_query: the gradient of queries so far.
        of_key: the gradient of the block's keys so far, which travels with them.
        of_value: that of its values.
        sees: as in `ring_step`.
        start: as in `ring_step`.
        last: there is no block to come.
        attn_mask: as in `ring_step`.
        scale: as in `ring_step`.
    """
    known, operands = (of_query, of_key, of_value), (query, key, value)
    wide = _wide(query.dtype)
    shares: tuple[Tensor | None, ...] = (None, None, None)
    if sees != "none":
        mask = _columns(attn_mask, start, key)
        shares = _backward(
            gradient, *operands, out, logsumexp, 0.0, sees == "causal", attn_mask=mask, scale=scale
        )
    query_, key_, value_ = (
        _sum(old, new, like, like.dtype if last else wide)
        for old, new, like in zip(known, shares, operands, strict=True)
    )
    return query_, key_, value_


@ring_step_backward.register_fake
def _(
    _gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = query.dtype if rest[7] else _wide(query.dtype)
    made = (t.new_empty(t.shape, dtype=dtype) for t in (query, key, value))
    of_query, of_key, of_value = made
    return of_query, of_key, of_value


def _sum(old: Tensor | None, new: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Of what there is; in memory of its own."""
    if old is not None and new is not None:
        return (old + new).to(dtype)
    found = new if old is None else old
    if found is None:
        return like.new_zeros(like.shape, dtype=dtype)
    return found.to(dtype, copy=True)


def _columns(mask: Tensor | None, start: int, key: Tensor) -> Tensor | None:
    """The mask's columns for a block of keys."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    return mask.narrow(-1, start, key.shape[2])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
