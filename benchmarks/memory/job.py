"""What the sweep of bills trains: a GPT of some ten to hundred MiB of weights, on drawn tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import models
from meshwright import Job

SAMPLES, VOCABULARY = 64, 512


def job(
    depth: int = 6, width: int = 512, context: int = 128, batch: int = 8, ema: float = 0.0
) -> Job:
    """By default 74 MiB of weights."""
    shape = models.Shape(width, width // 64, depth, context, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, context), generator=generator)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return models.loss(model(ids), ids)

    return Job(
        model=lambda: models.of(shape),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        data=lambda: [*tokens],
        batch_size=batch,
        steps=8,
        ema=ema or None,
    )
