"""Training with precision=bf16 loses as float32 does: 100 steps of each, side by side."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import models
from benchmarks.harness.crew import Crew
from benchmarks.harness.task import Task

STEPS, BLOCK = 100, 10
PLANS = {"float32": "data=2", "bf16": "data=2,precision=bf16"}


def curves(steps: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Losses by precision, from equal weights over equal batches, 10M GPT, 1 sequence a rank."""
    task = Task("ours", "gpt10m", 1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mw-curve-") as folder:
        weights = Path(folder) / "weights.safetensors"
        models.save_weights(task.model, weights)
        for name, plan in PLANS.items():
            say(f"{steps} steps in {name}")
            mine = replace(task, plan=plan, weights=str(weights))
            crew = Crew.started(name, mine, Path(folder) / name)
            try:
                found[name] = [*crew.losses(), *crew.turn(steps, warm=0).losses][:steps]
            finally:
                crew.close()
    return found


def ratios(curve: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of the mean losses of each ten steps."""
    return [a / b for a, b in zip(_blocks(curve), _blocks(reference), strict=True)]


def _blocks(curve: Sequence[float]) -> list[float]:
    starts = range(0, len(curve) - BLOCK + 1, BLOCK)
    return [statistics.mean(curve[start : start + BLOCK]) for start in starts]
