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


def in_parts(pair: tuple, microbatches: int) -> list[tuple]:
    """A batch in micro-batches."""
    return [*zip(*(tensor.chunk(microbatches) for tensor in pair), strict=True)]


def loop(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    microbatches: int | None = None,
) -> Step:
    """Forward, backward, step; the loss of this rank's rows is read every step, as by all.

    Args:
        task: the process's.
        model, optimizer: its.
        microbatches: in place of the task's.
    """
    feed, count = itertools.cycle(own_batches(task)), microbatches or task.microbatches

    def step() -> float:
        losses = []
        for tokens, targets in in_parts(next(feed), count):
            loss = models.loss(model(tokens), targets) / count
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum().item()

    return step
