"""Hugging Face Accelerate, DDP underneath."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, own_batches
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """As its guide says."""
    accelerator = Accelerator(cpu=True)
    bare = models.loaded(task.model, task.weights, task.dropout)
    model, optimizer = accelerator.prepare(bare, models.optimizer(bare.parameters()))
    feed = itertools.cycle(own_batches(task))

    def step() -> float:
        tokens, targets = next(feed)
        loss = models.loss(model(tokens), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    yield step
    dist.destroy_process_group()
