"""What one rank holds while it begins, in a process of its own; also a job file for `mw plan`.

    python -m tests.run.footprint state PLAN [WEIGHTS]
    python -m tests.run.footprint mw WORDS...

The first makes the last rank's state and prints, in bytes, what it keeps (`share`), the largest
tensor of the model, and by how much the process grew meanwhile. The second runs a command; its last
line on stderr is the most bytes that the process held.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from meshwright import Job
from meshwright.cli import main as mw
from meshwright.plan.plan import Plan
from meshwright.run.given import given_weights
from meshwright.run.prepare import prepare
from meshwright.run.worker import initial_state

WIDTH, LAYERS = 1448, 8


class Layers(nn.Module):
    """Products of `width` columns, two a layer."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


class Rows(torch.utils.data.Dataset):
    """A row for every number up to eight."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        return torch.full((self.width,), float(index))


def job(
    width: int = WIDTH, layers: int = LAYERS, meta: bool = False, weights: str | None = None
) -> Job:
    """By default 128 MiB in tensors of 8; `meta`: its factory leaves them on the meta device."""

    def model() -> nn.Module:
        with torch.device("meta" if meta else "cpu"):
            return Layers(width, layers)

    return Job(
        model=model,
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        data=lambda: Rows(width),
        batch_size=8,
        weights=weights,
    )


def peak() -> int:
    """The most bytes that this process ever held (`getrusage` counts those of its parent too)."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return int(line.split()[1]) * 1024


def state(text: str, weights: str | None = None) -> None:
    """Make a rank's state."""
    plan = Plan.parse(text)
    build = prepare(job(weights=weights), plan, plan.ranks)
    make = None if weights is None else given_weights(build, weights)[0]
    before = peak()
    made = initial_state(build, plan.ranks - 1, make)
    grew = peak() - before
    share = sum(tensor.untyped_storage().nbytes() for tensor in made.values.values())
    largest = max(value.bytes for value in build.values().values())
    sys.stdout.write(json.dumps({"share": share, "largest": largest, "grew": grew}))


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "state":
        state(*words)
    else:
        status = mw(words)
        sys.stderr.write(f"{peak()}\n")
        sys.exit(status)
