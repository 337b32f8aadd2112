"""What a plan is checked against, and what a check answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.plan.plan import Plan

__all__ = ["Check", "Facts", "Problem"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan is laid over.

    Attributes:
        world: ranks there are.
        batch_size: samples per step over all ranks; None while it is not known.
        normalize_over: samples whose statistics a batch norm shares; None where the job leaves it.
        normalizes: the model has batch norm.
        clip_norm: the largest global norm that gradients keep; None where they keep any.
        slices: of a batch, for AdaScale; None where the job has none.
        ema: decay of the average of the weights; None where there is none.
    """

    world: int
    batch_size: int | None = None
    normalize_over: int | None = None
    normalizes: bool = False
    clip_norm: float | None = None
    slices: int | None = None
    ema: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a plan does not fit, and what to do."""

    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


Check = Callable[[Plan, Facts], tuple[Problem, ...]]
