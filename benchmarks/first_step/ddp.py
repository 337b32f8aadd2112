"""The same step under DDP; the time at which it is done goes to a file.

torchrun --standalone --nproc-per-node 2 benchmarks/first_step/ddp.py FILE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import models

ROWS, MODEL = 2, "gpt10m"  # of job.py, which needs meshwright


def main() -> None:
    """One step."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(models.model(MODEL), gradient_as_bucket_view=True)
    optimizer = models.optimizer(model.parameters())
    data = models.rows_of(models.batches(MODEL, ROWS), dist.get_rank(), dist.get_world_size())
    tokens, targets = data[0]
    loss = models.loss(model(tokens), targets)
    loss.backward()
    optimizer.step()
    loss.item()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(str(time.monotonic()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
