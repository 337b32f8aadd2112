"""The CTC loss as two ops of fixed shapes, whose samples can be split.

torch's keeps a table as wide as the longest target, and is mostly given targets end to end, picked
by a mask: neither shape is known beforehand. Here targets stay rows, those that count moved to the
front, and the backward makes the table again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["Ctc"]

aten = torch.ops.aten
_PICKS = (torch.Tensor.masked_select, torch.masked_select, torch.Tensor.__getitem__)
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


@dataclass(frozen=True, slots=True)
class _Picked:
    """What a mask picks of rows; `place` stands for it, and is kept since it is known by its id."""

    place: Tensor
    rows: Tensor
    mask: Tensor

    def packed(self) -> Tensor:
        """Each row's picked elements at its front."""
        order = torch.sort((~self.mask).to(torch.uint8), dim=1, stable=True)[1]
        return self.rows.gather(1, order)


class Ctc(TorchFunctionMode):
    """`ctc_loss` is ours under it, and so is what it alone reads: targets picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.picked: dict[int, _Picked] = {}

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.ctc_loss and (asked := _asked(*args, **kwargs)) is not None:
            targets, lengths = self._targets(asked["targets"], asked["target_lengths"])
            if targets is not None:
                return _loss({**asked, "targets": targets, "target_lengths": lengths})
        if func in _PICKS and len(args) == 2 and not kwargs and _rows_by_mask(*args):
            rows, mask = args
            place = rows.reshape(-1).clone()
            self.picked[id(place)] = _Picked(place, rows, mask)
            return place
        if self.picked:
            args, kwargs = pytree.tree_map(self._real, (args, kwargs))
        return func(*args, **kwargs)

    def _real(self, given: Any) -> Any:
        """What stands for picked elements, as those: their shape is not known, which is told."""
        found = self.picked.get(id(given))
        return given if found is None else found.rows.masked_select(found.mask)

    def _targets(self, targets: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor]:
        """(rows of targets, how many of each count); None where they lie end to end."""
        found = self.picked.get(id(targets))
        if found is None:
            return (targets if targets.dim() == 2 else None), lengths
        counted = found.mask.sum(1)
        # Else rows would not begin where torch begins them; read here, it is watched for.
        aligned = bool((counted == lengths).all())
        return (found.packed() if aligned else None), lengths


def _rows_by_mask(rows: Any, mask: Any) -> bool:
    if not isinstance(rows, Tensor) or not isinstance(mask, Tensor):
        return False
    alike = rows.dim() == 2 and rows.shape == mask.shape
    return alike and (rows.dtype, mask.dtype) == (torch.long, torch.bool)


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
