"""DeepSpeed's pipeline engine over gloo: 1F1B, layers dealt out evenly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed as ds
from deepspeed.pipe import PipelineModule

from benchmarks import models
from benchmarks.contestants.torch_loop import Step, in_parts
from benchmarks.harness.task import Task


@contextmanager
def opened(task: Task) -> Iterator[Step]:
    """Its engine, fed micro-batch by micro-batch; it tells every rank the loss."""
    ds.init_distributed("gloo")
    rows = task.rows * task.ranks
    net = PipelineModule(
        layers=list(models.loaded(task.model, task.weights, task.dropout)),
        loss_fn=models.loss,
        num_stages=task.ranks,
        partition_method="uniform",
    )
    engine, *_ = ds.initialize(
        model=net,
        optimizer=models.optimizer(net.parameters()),
        config={
            "train_micro_batch_size_per_gpu": rows // task.microbatches,
            "gradient_accumulation_steps": task.microbatches,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
        },
    )
    whole = models.batches(task.model, rows)
    feed = itertools.cycle(part for pair in whole for part in in_parts(pair, task.microbatches))
    yield lambda: float(engine.train_batch(feed))
    ds.comm.destroy_process_group()
