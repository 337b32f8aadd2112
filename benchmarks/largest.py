"""GPipe's Table 1, scaled down: the most layers that train in a given memory per rank.

By the memory bill of what is compiled; nothing is run. As in the paper, whoever computes again cuts
the batch into micro-batches, and whoever does not is one process without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import models
from meshwright import Job
from meshwright.plan.plan import Plan
from meshwright.run.bill import bills
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare

WIDTH, HEADS, CONTEXT, VOCABULARY, SAMPLES = 128, 4, 128, 256, 12
MEMORY = 52 << 20
CASES = {
    "1 stage": "data=1",
    "1 stage, computed again": "remat=full,microbatches=12",
    "2 stages, computed again": "pipeline=2,schedule=gpipe,remat=full,microbatches=12",
    "4 stages, computed again": "pipeline=4,schedule=gpipe,remat=full,microbatches=12",
}
PAPER = {"1 stage": 3, "1 stage, computed again": 13, "8 stages, computed again": 103}
"""Layers of GPipe's Transformer on 16 GB each (its Table 1); its 8 stages have 12.9 each."""


@dataclass(frozen=True, slots=True)
class Largest:
    """The deepest model that fits: its layers and parameters, bytes of its neediest rank."""

    layers: int
    parameters: int
    needed: int


def needed(plan: str, layers: int) -> Largest:
    """What a model of so many layers takes."""
    text = Plan.parse(plan)
    build = prepare(_job(layers), text, text.ranks)
    most = max(sum(bill.values()) for bill in bills(build, first_micros(build)))
    counted = sum(tensor.numel() for tensor in build.model.parameters.values())
    return Largest(layers, counted, most)


def largest(plan: str, say: Callable[[str], None] = lambda _: None) -> Largest:
    """The deepest model whose neediest rank needs no more than `MEMORY`.

    The bill is nearly a straight line in the layers, so the answer is guessed from the last two
    and then gone to one by one.
    """
    known = {layers: needed(plan, layers) for layers in (4, 8)}
    each = (known[8].needed - known[4].needed) / 4
    layers = max(1, int(8 + (MEMORY - known[8].needed) / each))
    while True:
        for near in (layers, layers + 1):
            if near not in known:
                known[near] = needed(plan, near)
                say(f"{plan}: {near} layers need {known[near].needed / 2**20:.1f} MiB")
        if known[layers].needed > MEMORY:
            layers -= 1
        elif known[layers + 1].needed <= MEMORY:
            layers += 1
        else:
            return known[layers]


def _job(layers: int) -> Job:
    shape = models.Shape(WIDTH, HEADS, layers, CONTEXT, VOCABULARY)
    tokens = torch.zeros(SAMPLES, CONTEXT, dtype=torch.int64)

    def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return models.loss(model(ids), ids)

    return Job(
        model=lambda: models.of(shape),
        loss=loss,
        optimizer=lambda model: models.optimizer(model.parameters()),
        data=lambda: [*tokens],
        batch_size=SAMPLES,
    )
