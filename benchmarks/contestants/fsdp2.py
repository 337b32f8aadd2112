"""torch's fully_shard, once per block and once for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, loop
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """ZeRO-3 as torch does it."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (task.ranks,))
    model = models.loaded(task.model, task.weights, task.dropout)
    for block in model[1:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield loop(task, model, models.optimizer(model.parameters()))
    dist.destroy_process_group()
