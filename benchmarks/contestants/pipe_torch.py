"""torch.distributed.pipelining: stages cut by hand between layers, by its own schedules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from benchmarks import models
from benchmarks.contestants.torch_loop import Step
from benchmarks.harness.task import Task

SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL = {"interleaved": ScheduleInterleaved1F1B, "zb-v": ScheduleZBVZeroBubble}


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """A rank's stages; the rank of the last one tells the loss."""
    dist.init_process_group("gloo")
    mine, count = held(task.schedule, task.rank, task.ranks)
    whole = models.loaded(task.model, task.weights, task.dropout)
    parts = models.stages(whole, count)
    modules = nn.ModuleList(parts[number] for number in mine)
    stages = [
        PipelineStage(module, number, count, torch.device("cpu"))
        for module, number in zip(modules, mine, strict=True)
    ]
    if task.schedule in SINGLE:
        schedule = SINGLE[task.schedule](stages[0], task.microbatches, loss_fn=models.loss)
    else:
        schedule = SEVERAL[task.schedule](stages, task.microbatches, loss_fn=models.loss)
    optimizer = models.optimizer(modules.parameters())
    feed = itertools.cycle(models.batches(task.model, task.rows * task.ranks))

    def step() -> float | None:
        tokens, targets = next(feed)
        losses: list[torch.Tensor] = []
        given = (tokens,) if 0 in mine else ()
        asked = {"target": targets, "losses": losses} if count - 1 in mine else {}
        schedule.step(*given, **asked)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().item() if losses else None

    yield step
    dist.destroy_process_group()


def held(schedule: str, rank: int, ranks: int) -> tuple[list[int], int]:
    """A rank's stages, and how many there are."""
    if schedule in SINGLE:
        return [rank], ranks
    if schedule == "zb-v":
        return [rank, 2 * ranks - 1 - rank], 2 * ranks
    return [rank, rank + ranks], 2 * ranks
