"""Machine: what a pipeline is laid over, and what each of its workers may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Level", "Memory"]


@dataclass(frozen=True, slots=True)
class Level:
    """`units` of what the level below makes (workers, then machines), joined at `bandwidth`.

    Attributes:
        units: how many.
        bandwidth: bytes per second between two of them.
    """

    units: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What a worker may hold.

    A stage with w workers from it to the end of the pipeline, r of them its own, has ceil(w / r)
    mini-batches in flight; it holds the activations of each, and the weights that each began with.

    Attributes:
        capacity: bytes.
        versions: of weights, at most; None is one for each mini-batch in flight, 1 is a pipeline
            that is flushed at each step, 2 is double buffering.
        beside: bytes beside the versions, per byte of weights: gradients, the optimizer's state.
        microbatches: in flight at most; None is as many as the pipeline takes.
    """

    capacity: float
    versions: int | None = None
    beside: float = 0.0
    microbatches: int | None = None

    def need(self, weights: float, activations: float, after: Fraction) -> float:
        """Bytes that a worker of a stage holds; `after` is workers after it, per one of its own."""
        flying = math.ceil(1 + after)
        if self.microbatches is not None:
            flying = min(flying, self.microbatches)
        versions = flying if self.versions is None else min(flying, self.versions)
        return (versions + self.beside) * weights + flying * activations
