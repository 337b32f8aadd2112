"""Plain eager torch, not distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, loop
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """One process's own model."""
    model = models.loaded(task.model, task.weights, task.dropout)
    yield loop(task, model, models.optimizer(model.parameters()))
