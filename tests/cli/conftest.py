"""The command line in this process, and a job small enough for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshwright.cli import main

SUMS = """
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import meshwright as mw

POINTS = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(8, width)
        self.down = torch.nn.Linear(width, 1)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def loss(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def job(width: int = 16, lr: float = 1e-2, bad: Literal["no", "loss", "data"] = "no") -> mw.Job:
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 256

        def __getitem__(self, index):
            if bad == "data" and index == 77:
                raise ValueError("row 77 is damaged")
            return POINTS[index], POINTS[index].sum(0, keepdim=True)

    def broken(model, batch):
        raise ArithmeticError("no loss today")

    return mw.Job(
        model=lambda: Model(width),
        loss=broken if bad == "loss" else loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=lr),
        data=Data,
        evaluation=Data,
        batch_size=32,
        steps=3,
    )


plain = job()
number = 7


def nothing():
    return None


if __name__ == "__main__":
    raise SystemExit("the guard ran")
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty working folder with `sums.py` in it; imports leave no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "sums.py").write_text(SUMS)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def mw(folder, capfd) -> Callable[..., Outcome]:
    """Run a command in `folder`."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capfd.readouterr())

    return run
