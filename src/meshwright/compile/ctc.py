"""The CTC loss as two ops of fixed shapes, whose samples can be split.

torch's keeps a table as wide as the longest target, and is mostly given targets end to end, picked
by a mask: neither shape is known beforehand. Here targets stay rows, those that count moved to the
front, and the backward makes the table again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["ctc_loss"]

aten = torch.ops.aten
_REDUCTIONS = ("none", "mean", "sum")


@torch.library.custom_op("meshwright::ctc", mutates_args=())
def ctc(log_probs: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """The loss of each sample: log_probs (t n c), targets (n s), how much of each counts (n)."""
    sizes = frames.tolist(), lengths.tolist()
    found: Tensor = aten._ctc_loss.default(log_probs, targets, *sizes, blank)[0]
    return found.clone()


@ctc.register_fake
def _(log_probs: Tensor, *_: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape[1])


@torch.library.custom_op("meshwright::ctc_backward", mutates_args=())
def ctc_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    frames: Tensor,
    lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """The gradient of `log_probs`."""
    sizes = frames.tolist(), lengths.tolist()
    found, table = aten._ctc_loss.default(log_probs, targets, *sizes, blank)
    made: Tensor = aten._ctc_loss_backward.default(
        grad.contiguous(), log_probs, targets, *sizes, found, table, blank, zero_infinity
    )
    return made.clone()


@ctc_backward.register_fake
def _(grad: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    del grad
    return torch.empty_like(log_probs)


class _Loss(torch.autograd.Function):
    """The ops above, differentiable."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        log_probs: Tensor,
        targets: Tensor,
        frames: Tensor,
        lengths: Tensor,
        blank: int,
        zero_infinity: bool,
    ) -> Tensor:
        ctx.save_for_backward(log_probs, targets, frames, lengths)
        ctx.how = blank, zero_infinity
        return torch.ops.meshwright.ctc(log_probs, targets, frames, lengths, blank)  # type: ignore[no-any-return]

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        made = torch.ops.meshwright.ctc_backward(gradient, *ctx.saved_tensors, *ctx.how)
        return made, None, None, None, None, None


def ctc_loss(
    picked: Callable[[Tensor], tuple[Tensor, Tensor] | None], *args: Any, **kwargs: Any
) -> Tensor | None:
    """`ctc_loss` of torch, by the ops above; None where torch is to answer.

    Args:
        picked: (rows, mask) where targets are what a mask picked of rows.
        args: of the call.
        kwargs: of the call.
    """
    asked = _asked(*args, **kwargs)
    if asked is None:
        return None
    found, targets = picked(asked["targets"]), asked["targets"]
    if found is not None:
        targets = _packed(*found, asked["target_lengths"])
    return _loss({**asked, "targets": targets}) if targets.dim() == 2 else None


def _packed(rows: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Each row's picked elements at its front."""
    if bool((mask.sum(1) != lengths).any()):  # else rows do not begin where torch begins them
        raise ValueError("target_lengths is not how much the mask picks of each row")
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True)[1]
    return rows.gather(1, order)


def _asked(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> dict[str, Any] | None:
    """A call by name; None where torch is to answer (or to refuse)."""
    if log_probs.dim() != 3 or reduction not in _REDUCTIONS:
        return None
    frames, lengths = (torch.as_tensor(given) for given in (input_lengths, target_lengths))
    if frames.dim() != 1 or lengths.dim() != 1:
        return None
    return {
        "log_probs": log_probs, "targets": targets, "input_lengths": frames,
        "target_lengths": lengths, "blank": blank, "reduction": reduction,
        "zero_infinity": zero_infinity,
    }  # fmt: skip


def _loss(asked: Mapping[str, Any]) -> Tensor:
    lengths = asked["target_lengths"].long()
    zeroed, reduction = asked["zero_infinity"], asked["reduction"]
    frames = asked["input_lengths"].long()
    found: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        asked["log_probs"], asked["targets"], frames, lengths, asked["blank"], zeroed
    )
    if zeroed:
        found = torch.where(found == math.inf, 0, found)
    if reduction == "mean":
        found = (found / lengths.clamp(min=1)).mean()
    return found.sum() if reduction == "sum" else found
