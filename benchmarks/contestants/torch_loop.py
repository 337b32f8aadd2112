"""The loop that torch's users write, and the data of a rank: what most contestants share."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import models
from benchmarks.harness.task import Task

Step = Callable[[], float]


def own_batches(task: Task) -> list[tuple]:
    """This process's rows of the global batches."""
    return models.rows_of(models.batches(task.model, task.rows * task.ranks), task.rank, task.ranks)


def loop(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Forward, backward, step; the loss of this rank's rows is read every step, as by all."""
    feed = itertools.cycle(own_batches(task))

    def step() -> float:
        tokens, targets = next(feed)
        loss = models.loss(model(tokens), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
