"""The pipelines' matrix as data: models x schedule x stages x micro-batches x what goes with it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEDULES = (
    "gpipe", "1f1b", "interleaved,virtual=2", "zb-h1", "zb-h2", "zb-v", "dualpipe-v",
)  # fmt: skip
STAGES = (2, 3, 4)
MICROBATCHES = (1, 3, 8)
BESIDE = ("alone", "data=2", "tensor=2", "zero1,data=2", "zero2,data=2", "zero3,data=2",
          "remat=full")  # fmt: skip
MODELS = ("gpt", "t5", "unet", "resnet", "mixtral")
CHEAP = ("unet", "resnet")
"""Models that are traced and cut in a fraction of a second."""

FEW = (
    "gpt pipeline=3,schedule=1f1b,microbatches=3",
    "gpt tensor=2,pipeline=2,schedule=zb-v,microbatches=3",
    "t5 pipeline=4,schedule=zb-h2,microbatches=1",
    "t5 zero3,data=2,pipeline=2,schedule=dualpipe-v,microbatches=1",
    "mixtral remat=full,pipeline=2,schedule=interleaved,virtual=2,microbatches=1",
    "mixtral data=2,pipeline=3,schedule=zb-h1,microbatches=1",
)
"""Cells of the others that `make test` has time for."""


@dataclass(frozen=True, order=True)
class Piped:
    """One place of the pipelines' matrix."""

    model: str
    schedule: str
    stages: int
    microbatches: int
    beside: str

    @property
    def row(self) -> str:
        """The pipeline."""
        return f"pipeline={self.stages},schedule={self.schedule}"

    @property
    def plan(self) -> str:
        """As the command line takes it."""
        first = "" if self.beside == "alone" else f"{self.beside},"
        return f"{first}{self.row},microbatches={self.microbatches}"

    def __str__(self) -> str:
        return f"{self.model} {self.plan}"


def piped() -> tuple[Piped, ...]:
    """Every cell."""
    factors = (MODELS, SCHEDULES, STAGES, MICROBATCHES, BESIDE)
    return tuple(itertools.starmap(Piped, itertools.product(*factors)))


def pairs(cell: Piped) -> set[tuple[tuple[str, Any], ...]]:
    """Every two of its values; of a schedule beside others only how it cuts backwards."""
    names = ("schedule", "stages", "microbatches", "beside", "model")
    found = set(itertools.combinations([(name, getattr(cell, name)) for name in names], 2))
    found.remove((("schedule", cell.schedule), ("beside", cell.beside)))
    return {*found, (("backward", _backward(cell)), ("beside", cell.beside))}


def _backward(cell: Piped) -> str:
    """Whether backwards are whole, split, or some of them split."""
    return {"z": "split", "d": "both"}.get(cell.schedule[0], "whole")


def sampled(everything: Sequence[Piped]) -> tuple[Piped, ...]:
    """Few cells in which every two values of different factors meet, greedily chosen."""
    chosen: list[Piped] = []
    left = set().union(*map(pairs, everything))
    while left:
        best = max(everything, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return tuple(chosen)
