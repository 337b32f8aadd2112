"""Worlds of real processes: a worker script, and the supervisor in the test's own process."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshwright.launch.local import launch

PRELUDE = """
import os, signal, sys
from pathlib import Path
import torch
from meshwright.comm.base import *
from meshwright.launch import contract as contracts, worker
from meshwright.launch.signals import listen

contract = contracts.read(os.environ)
rank, world = contract.world.rank, Group.world(contract.world.size)

def total(comm, value, label=""):
    return comm.perform(all_reduce(torch.tensor([float(value)]), world, label=label)).item()

def say(name, text=""):
    Path(name).write_text(str(text))
"""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    status: int
    out: str
    err: str
    run_dir: Path

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank{rank}.log").read_text()


def script(folder: Path, body: str) -> Path:
    """A worker whose `body(comm)` is the given text."""
    path = folder / "worker.py"
    inside = textwrap.indent(textwrap.dedent(body), "    ")
    path.write_text(
        f"{PRELUDE}\ndef body(comm):\n{inside}\n    return 0\n\n"
        "if __name__ == '__main__':\n    sys.exit(worker.serve(contract, body))\n"
    )
    return path


@pytest.fixture
def ranks(tmp_path, capfd, monkeypatch) -> Callable[..., Outcome]:
    """Run `body` on `n` ranks, or a whole `command`, and tell how it ended."""
    monkeypatch.chdir(tmp_path)

    def run(n: int, body: str = "", command: list[str] | None = None, **options) -> Outcome:
        command = command or [sys.executable, str(script(tmp_path, body))]
        run_dir = tmp_path / "run"
        status = launch(n, command, run_dir=run_dir, **options)
        out, err = capfd.readouterr()
        return Outcome(status, out, err, run_dir)

    return run
