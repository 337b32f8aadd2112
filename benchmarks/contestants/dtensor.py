"""torch's tensor parallelism: `parallelize_module` with Megatron's layouts, by hand per module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, loop
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """Every rank takes the whole batch and its heads."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (task.ranks,))
    model = models.loaded(task.model, task.weights, task.dropout)
    columns = dict.fromkeys(("q", "k", "v", "up"), ColwiseParallel())
    rows = dict.fromkeys(("o", "down"), RowwiseParallel())
    for block in model[1:-1]:
        parallelize_module(block, mesh, {**columns, **rows})
        block.heads //= task.ranks
    # Not fused: plain and distributed parameters are mixed.
    optimizer = torch.optim.AdamW(model.parameters(), lr=models.LR, foreach=False)
    whole = Task(task.module, task.model, task.rows * task.ranks, ranks=1, weights=task.weights)
    yield loop(whole, model, optimizer)
    dist.destroy_process_group()
