"""A user's file with one thing wrong: the pieces of a tiny job, each of which a test can replace.

The job learns a sum of four numbers with one linear layer, so that a step takes milliseconds.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

PRELUDE = """
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import meshwright as mw

RANK = int(os.environ.get("RANK", "0"))


class Data(torch.utils.data.Dataset):
    def __init__(self, length=64):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        x = torch.tensor([index, index % 3, index % 5, 1.0]) / 64
        return {"x": x, "y": x.sum(0, keepdim=True)}


class Model(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()

"""

PIECES = {
    "model": "Model",
    "loss": "loss",
    "optimizer": "lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2)",
    "data": "Data",
    "batch_size": "8",
    "steps": "3",
}


def write_job(path: Path, extra: str = "", **pieces: str) -> Path:
    """Write a job file.

    Args:
        path: of the file.
        extra: source that stands before the job; it may define `Model`, `loss`, `Data` anew.
        pieces: source of the job's arguments, in place of `PIECES` or beside them.
    """
    arguments = "".join(f"    {name}={text},\n" for name, text in (PIECES | pieces).items())
    path.write_text(f"{PRELUDE}{textwrap.dedent(extra)}\n\njob = mw.Job(\n{arguments})\n")
    return path
