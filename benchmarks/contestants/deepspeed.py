"""DeepSpeed's ZeRO stages over gloo, with torch's AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed as ds

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, own_batches
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """Its engine; in stage 3 every parameter is sharded, as it is in ours."""
    ds.init_distributed("gloo")
    zero = {"stage": task.stage}
    if task.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    model = models.loaded(task.model, task.weights, task.dropout)
    engine, *_ = ds.initialize(
        model=model,
        optimizer=models.optimizer(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": task.rows,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10**9,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )
    feed = itertools.cycle(own_batches(task))

    def step() -> float:
        tokens, targets = next(feed)
        loss = models.loss(engine(tokens), targets)
        engine.backward(loss)
        engine.step()
        return loss.item()

    yield step
    ds.comm.destroy_process_group()
