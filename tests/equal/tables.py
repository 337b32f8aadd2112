"""The tables of the equality matrix as data: which rows meet which plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from tests.equal import piped
from tests.equal.cells import MICROBATCHES, MODELS, PRECISIONS, RANKS, STAGES, Cell
from tests.equal.mixtures import MIXTURES
from tests.equal.zoo_other import OTHERS
from tests.equal.zoo_text import FAMILIES


@dataclass(frozen=True, slots=True)
class Table:
    """Rows x plans x micro-batches, every cell of which is run.

    Attributes:
        title: on the page.
        rows: models.
        plans: columns, without their micro-batches.
        microbatches: each a table of its own on the page.
    """

    title: str
    rows: tuple[str, ...]
    plans: tuple[str, ...]
    microbatches: tuple[int, ...] = MICROBATCHES

    @property
    def cells(self) -> tuple[tuple[str, str, int], ...]:
        """Row, plan, micro-batches; the cells of a row follow each other."""
        return tuple(itertools.product(self.rows, self.plans, self.microbatches))


def with_micros(plan: str, microbatches: int) -> str:
    """The plan as the command line takes it."""
    return f"{plan},microbatches={microbatches}" if microbatches > 1 else plan


def _table(title: str, rows: Iterable[str], plans: Iterable[str]) -> Table:
    return Table(title, tuple(rows), tuple(plans))


_SHARDED = ("zero1,data=2", "zero2,data=2", "zero3,data=2", "zero3,data=4,shard=2")
_TENSOR = ("tensor=2", "data=2,tensor=2", "zero2,data=2,tensor=2", "zero3,data=2,tensor=2")

SHARDS = tuple(
    Cell("", 1, zero, ranks, precision).plan
    for precision, zero, ranks in itertools.product(PRECISIONS, STAGES, RANKS)
)
BASE = _table("Data parallelism and ZeRO", MODELS, SHARDS)
TEXT = _table(
    "Text families",
    FAMILIES,
    (
        "data=2",
        *_TENSOR,
        "tensor=2,sequence=tensor",
        "zero3,data=2,tensor=2,sequence=tensor",
        "context=2",
        "zero3,data=2,context=2,tensor=2",
        *_SHARDED,
    ),
)
OTHER = _table("Vision, convolution and audio", OTHERS, ("data=2", *_TENSOR, *_SHARDED))
EXPERTS = _table(
    "Mixtures of experts",
    MIXTURES,
    (
        "data=2",
        "data=1,tensor=2",
        "data=1,expert=2",
        "data=1,expert=3",
        "data=2,expert=2",
        "zero3,data=2",
        "zero3,data=2,expert=2",
        "data=1,expert=2,tensor=2",
        "data=1,context=2,expert=2",
    ),
)
PIPED = {
    model: Table(
        f"Pipelines: {model}",
        tuple(f"pipeline={n},schedule={s}" for s in piped.SCHEDULES for n in piped.STAGES),
        piped.BESIDE,
        piped.MICROBATCHES,
    )
    for model in piped.MODELS
}
TABLES = (BASE, TEXT, OTHER, EXPERTS, *PIPED.values())
