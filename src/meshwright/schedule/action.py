"""Actions and schedules: what each rank of a pipeline computes, in which order; nothing else.

    rank 0   0F0 0F1 0F2     .   0B0 0B1 0B2
    rank 1     .   1F0 1B0 1F1 1B1 1F2 1B2

Sends and receives are not part of it: they follow from which stage reads what (`assemble`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "Kind", "Schedule"]

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; its part for the inputs (what earlier stages wait for); for weights."""


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One stage's work of one kind on one micro-batch."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        """`2F0`, as torch.distributed.pipelining writes it."""
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step of a pipeline.

    Attributes:
        name: as in a plan.
        placement: of each stage, the pipeline rank that holds it; with virtual stages a rank holds
            several.
        microbatches: how many a step has.
        ranks: of each pipeline rank, its actions in order.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        """How many stages there are, virtual ones counted."""
        return len(self.placement)

    @property
    def splits(self) -> bool:
        """Whether backwards are split into input and weight parts."""
        return any(action.kind in "IW" for actions in self.ranks for action in actions)
