"""torchgpipe: one process; its two devices are both "cpu", which share one worker thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchgpipe import GPipe

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, loop
from benchmarks.harness.task import Task

STAGES = 2


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """Two stages of as many layers; nothing is computed again, as in the others."""
    whole = models.loaded(task.model, task.weights, task.dropout)
    balance = [len(part) for part in models.stages(whole, STAGES)]
    model = GPipe(
        whole, balance, devices=["cpu"] * STAGES, chunks=task.microbatches, checkpoint="never"
    )
    # It cuts the batch by itself: the loop does not.
    yield loop(task, model, models.optimizer(model.parameters()), microbatches=1)
