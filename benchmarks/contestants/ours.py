"""Meshwright, as a user gets it: `mw.Run` under torchrun's environment, or in a world of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import meshwright as mw
from benchmarks import models
from benchmarks.contestants.torch_loop import Step, own_batches
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """A run under the task's plan; unconnected copies each take their own rows."""
    rows = task.rows * task.ranks
    pairs = models.batches(task.model, rows) if task.connected else own_batches(task)
    job = mw.Job(
        model=lambda: models.model(task.model, task.dropout),
        loss=lambda model, batch: models.loss(model(batch[0]), batch[1]),
        optimizer=lambda model: models.optimizer(model.parameters()),
        data=lambda: pairs_again(pairs),
        batch_size=rows if task.connected else task.rows,
        weights=task.weights,
    )
    with mw.Run(job, task.plan or "data=1", run_dir=task.folder, fresh=True, quiet=True) as run:
        yield lambda: run.step().loss


class pairs_again:  # noqa: N801  a user's iterable, not a type of ours
    """Global batches, read again from the first after the last."""

    def __init__(self, pairs: list[tuple]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[tuple]:
        return iter(self.pairs)
