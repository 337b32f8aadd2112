"""What both sides train one step of: `mw train benchmarks/first_step/job.py -n 2 --steps 1`."""

from __future__ import annotations

import meshwright as mw
from benchmarks import models

ROWS = 2  # of the global batch
MODEL = "gpt10m"

job = mw.Job(
    model=lambda: models.model(MODEL),
    loss=lambda model, batch: models.loss(model(batch[0]), batch[1]),
    optimizer=lambda model: models.optimizer(model.parameters()),
    data=lambda: models.samples(MODEL, ROWS),
    batch_size=ROWS,
)
