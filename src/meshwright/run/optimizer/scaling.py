"""Dynamic loss scaling: fp16 gradients are made of a loss times a scale that follows overflow.

As `torch.amp.GradScaler` has it (Micikevicius et al. 2018, section 3.2): a step whose gradients
overflow is left out and the scale backs off; after many steps without, it grows. Whether a step
overflowed is agreed by all ranks, so that the scale is one number of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import UserCodeError
from meshwright.job import LossScale

__all__ = ["Scaling", "nonfinite", "require_found", "restored", "saved", "scaling_of"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """Where the loss scale is.

    Attributes:
        rule: how it moves.
        samples: of a global batch; the traced loss is a sum over them.
        scale: of the next step.
        steps: applied since it last changed.
        skipped: steps left out in a row.
    """

    rule: LossScale
    samples: int
    scale: float
    steps: int = 0
    skipped: int = 0

    def operand(self, like: Tensor) -> Tensor:
        """What a program multiplies the loss's sum by."""
        return torch.full_like(like, self.scale / self.samples)

    def after(self, *, overflowed: bool) -> Scaling:
        """Where it is after a step."""
        rule = self.rule
        if overflowed:
            return replace(
                self, scale=_single(self.scale * rule.backoff), steps=0, skipped=self.skipped + 1
            )
        if self.steps + 1 < rule.interval:
            return replace(self, steps=self.steps + 1, skipped=0)
        grown = _single(self.scale * rule.growth)
        scale = grown if math.isfinite(grown) else self.scale
        return replace(self, scale=scale, steps=0, skipped=0)


def scaling_of(rule: LossScale | None, samples: int) -> Scaling:
    """At the first step."""
    rule = rule or LossScale()
    return Scaling(rule, samples, _single(rule.initial))


def _single(number: float) -> float:
    """As the float32 operand that it becomes."""
    return float(torch.tensor(number, dtype=torch.float32))


def nonfinite(gradients: Iterable[Tensor]) -> Tensor:
    """1.0 where an element of these is infinite or NaN, else 0.0; a float64 scalar."""
    tensors = [tensor for tensor in gradients if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    largest = [torch.linalg.vector_norm(tensor, torch.inf).to(torch.float64) for tensor in tensors]
    return (~torch.stack(largest).isfinite()).any().to(torch.float64)


def require_found(scaling: Scaling, step: int, loss: float) -> None:
    """Return if a scale may still be found.

    Args:
        scaling: after the step, which overflowed.
        step: its number.
        loss: of it.

    Raises:
        UserCodeError: it was looked for as often in a row as the rule allows.
    """
    if scaling.skipped < scaling.rule.patience:
        return
    last = scaling.scale / scaling.rule.backoff
    where = "backward" if math.isfinite(loss) else "forward"
    raise UserCodeError(
        f"no loss scale was found: the gradients of {scaling.skipped} steps in a row overflowed "
        f"fp16, those of step {step + 1} at a loss scale of {last:g}; nothing of these steps was "
        f"applied. The last one's loss is {loss:g}: its {where} goes beyond fp16's 65504. Use "
        "precision=bf16, which has float32's range, or let the modules that overflow compute in "
        "float32 ([precisions] in the plan's TOML); where float32 overflows too, check the data "
        "and lower the learning rate"
    )


def saved(scaling: Scaling | None) -> dict[str, float] | None:
    """As a checkpoint keeps it."""
    if scaling is None:
        return None
    return {"scale": scaling.scale, "steps": scaling.steps, "skipped": scaling.skipped}


def restored(scaling: Scaling, kept: Mapping[str, Any] | None) -> Scaling:
    """Where a checkpoint left it; the beginning, where it is of a run that scaled nothing."""
    if kept is None:
        return scaling
    return replace(
        scaling,
        scale=float(kept["scale"]),
        steps=int(kept["steps"]),
        skipped=int(kept["skipped"]),
    )
