"""FairScale's ShardedDDP with its sharded optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim.oss import OSS

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, loop
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """ZeRO-2's sharding: each rank reduces and updates its part."""
    dist.init_process_group("gloo")
    model = models.loaded(task.model, task.weights, task.dropout)
    optimizer = OSS(model.parameters(), optim=torch.optim.AdamW, lr=models.LR, fused=True)
    yield loop(task, ShardedDataParallel(model, optimizer), optimizer)
    dist.destroy_process_group()
