"""One stage of a pipeline by itself, in eager torch: how long it takes without any waiting."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks import models
from benchmarks.contestants.torch_loop import own_batches
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Callable[[], None]]:
    """Stage `task.stage` of two, on inputs and gradients of the right shape."""
    parts = models.stages(models.loaded(task.model, task.weights, task.dropout), 2)
    mine, shape = parts[task.stage], models.SHAPES[task.model]
    optimizer = models.optimizer(mine.parameters())
    feed = itertools.cycle(own_batches(task))
    rows = task.rows // task.microbatches
    between = torch.randn(rows, shape.context, shape.width)

    def step() -> None:
        for tokens, targets in zip(*(t.split(rows) for t in next(feed)), strict=True):
            if task.stage == 0:
                mine(tokens).backward(between)
            else:
                loss = models.loss(mine(between.requires_grad_()), targets)
                (loss / task.microbatches).backward()
        between.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    yield step
