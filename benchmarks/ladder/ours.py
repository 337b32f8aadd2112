"""The ladder's GPT under Meshwright, as a user gets it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import meshwright as mw
from benchmarks import models
from benchmarks.contestants.torch_loop import Step
from benchmarks.ladder.rungs import RANKS, ROWS, RUNGS, Trial, shape_of, tokens


@contextmanager
def opened(trial: Trial) -> Iterator[Step]:
    """A run under the rung's plan."""
    torch.set_num_threads(1)
    job = mw.Job(
        model=lambda: models.of(shape_of(trial.width)),
        loss=lambda model, batch: models.loss(model(batch[0]), batch[1]),
        optimizer=lambda model: models.optimizer(model.parameters()),
        data=lambda: [pair for both in tokens() for pair in zip(*both, strict=True)],
        batch_size=ROWS * RANKS,
    )
    folder = Path(trial.folder, "run")
    with mw.Run(job, RUNGS[trial.rung].plan, run_dir=folder, fresh=True, quiet=True) as run:
        yield lambda: run.step().loss
