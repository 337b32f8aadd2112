"""torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, loop
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """With its buckets as views, the form that copies least."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(
        models.loaded(task.model, task.weights, task.dropout), gradient_as_bucket_view=True
    )
    yield loop(task, model, models.optimizer(model.parameters()))
    dist.destroy_process_group()
