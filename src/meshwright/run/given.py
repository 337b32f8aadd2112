"""The job's `weights`: from safetensors, or from a checkpoint of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from meshwright.program.layout import Bounds
from meshwright.run.imported import checkpoint_in, checkpoint_weights
from meshwright.run.match import compare as match
from meshwright.run.weights import read
from meshwright.run.worker import Make

__all__ = ["given_weights"]


def given_weights(worker_build: Any, path: str | Path) -> tuple[Make, list[str]]:
    """How to read the job's `weights` for a rank, and what to tell the user.

    Raises:
        StorageError: names or shapes do not fit, all problems at once.
    """
    model = worker_build.model
    inside = checkpoint_in(Path(path))
    weights = read(path) if inside is None else checkpoint_weights(inside)
    shapes = {
        name: tuple(t.shape) for name, t in (*model.parameters.items(), *model.buffers.items())
    }
    persistent = set(model.module.state_dict())
    wanted = {n: s for n, s in shapes.items() if n in persistent or n in model.parameters}
    found = match(weights.shapes(), wanted, model.tied, where=str(path))

    def make(name: str, _: Tensor, bounds: Bounds) -> Tensor | None:
        source = found.sources.get(name.partition("/")[2])
        if source is None or name.startswith("constant/"):
            return None
        start, shape = tuple(s for s, _ in bounds), tuple(n for _, n in bounds)
        return weights.slice(source, start, shape)

    return make, list(found.notes)
