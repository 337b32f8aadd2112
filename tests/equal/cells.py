"""The equality matrix as data: models x precision x ZeRO stage x ranks x micro-batches."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from meshwright import Job
from tests.equal.families import FAMILIES
from tests.laws.source import ROOT

BATCH = 64
STAGES = (0, 1, 2, 3)
RANKS = (2, 3, 4)
MICROBATCHES = (1, 3)
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True, order=True)
class Cell:
    """One place of the matrix."""

    model: str
    microbatches: int
    zero: int
    ranks: int
    precision: str = "float32"

    @property
    def plan(self) -> str:
        """As the command line takes it."""
        zero = f"zero{self.zero}," if self.zero else ""
        micro = f",microbatches={self.microbatches}" if self.microbatches > 1 else ""
        precision = f",precision={self.precision}" if self.precision != "float32" else ""
        return f"{zero}data={self.ranks}{micro}{precision}"

    def __str__(self) -> str:
        return f"{self.model} {self.plan}"


@cache
def example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"matrix_{name}", ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpt(folder: Path, dropout: float) -> Job:
    """examples/gpt.py, small."""
    del folder
    made: Job = example("gpt").job(depth=1, width=32, context=16, batch=BATCH, dropout=dropout)
    return made


def digits(folder: Path, **settings: Any) -> Job:
    """examples/digits.py, narrow."""
    del folder
    made: Job = example("digits").job(width=8, **{"batch": BATCH, **settings})
    return made


def finetune(folder: Path) -> Job:
    """examples/finetune.py, whose tiny GPT-2 has dropout."""
    module = example("finetune")
    made: Job = module.job(folder=str(module.tiny_gpt2(folder / "tiny-gpt2")), batch=BATCH)
    return made


def family(name: str) -> Callable[[Path], Job]:
    """One of `FAMILIES`."""
    return lambda _: FAMILIES[name](BATCH)


MODELS: dict[str, Callable[[Path], Job]] = {
    "gpt": lambda folder: gpt(folder, 0.0),
    "gpt, dropout": lambda folder: gpt(folder, 0.1),
    "digits": lambda folder: digits(folder, dropout=0.0),
    "digits, dropout": lambda folder: digits(folder, dropout=0.25),
    "digits, by 21": lambda folder: digits(folder, batch=63, normalize_over=21),
    "finetune": finetune,
    **{name: family(name) for name in FAMILIES},
}


def refused(cell: Cell) -> bool:
    """Batch norm shares a batch's statistics, which these micro-batches would split otherwise."""
    if cell.model == "digits, by 21":
        return cell.microbatches != 3
    return cell.model.startswith("digits") and cell.microbatches != 1


def cells() -> tuple[Cell, ...]:
    """Every cell, those that a check refuses too."""
    factors = (MODELS, MICROBATCHES, STAGES, RANKS, PRECISIONS)
    return tuple(itertools.starmap(Cell, itertools.product(*factors)))


def pairwise(everything: Sequence[Cell]) -> tuple[Cell, ...]:
    """Few cells in which every two values of different factors meet (greedily chosen)."""

    def pairs(cell: Cell) -> set[tuple[tuple[str, Any], ...]]:
        names = ("model", "microbatches", "zero", "ranks", "precision")
        values = [(name, getattr(cell, name)) for name in names]
        return set(itertools.combinations(values, 2))

    left = set().union(*map(pairs, everything))
    chosen: list[Cell] = []
    while left:
        best = max(everything, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return tuple(chosen)
