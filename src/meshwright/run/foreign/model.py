"""What a job's model is to be filled with: names and shapes, without memory for values."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.compile.init import blueprint
from meshwright.job import Job
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.foreign.source import Item

__all__ = ["model_items"]


def model_items(job: Job) -> tuple[dict[str, Item], Mapping[str, str]]:
    """Weights and the buffers that a state dict keeps, by global name; other names of tied ones."""
    model = blueprint(job.model, job.seed)
    kept = model.module.state_dict()
    named = {f"model/{name}": fake for name, fake in model.parameters.items()}
    named |= {f"buffer/{name}": fake for name, fake in model.buffers.items() if name in kept}
    items = {name: Item(dtype_name(t.dtype), tuple(t.shape)) for name, t in named.items()}
    return items, model.tied
