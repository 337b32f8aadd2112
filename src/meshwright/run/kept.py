"""Checkpoints across precisions: what one plan keeps in bf16 and another in float32.

Both ways are open: bf16 is float32 to the bit, and float32 is rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from meshwright.run.checkpoint.compare import Wanted
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.checkpoint.manifest import Entry
from meshwright.run.checkpoint.save import Checkpoint
from meshwright.run.worker import Worker

__all__ = ["KEPT", "cast_from", "may_cast", "read_cast"]

KEPT = frozenset({"float32", "bfloat16"})
"""Dtypes of weights and optimizer state without precision=bf16-pure, and with it."""


def may_cast(worker: Worker, checkpoint: Checkpoint) -> bool:
    """Whether one of the two plans, and not the model, is why dtypes differ."""
    pure = checkpoint.meta.get("precision") == "bf16-pure"
    return pure or bool(worker.build.precision.stored)


def cast_from(wanted: Mapping[str, Wanted], entries: Mapping[str, Entry]) -> dict[str, Wanted]:
    """What is wanted, weights in the dtype of `KEPT` that the checkpoint has them in."""
    found = dict(wanted)
    for name in wanted.keys() & entries.keys():
        if name.startswith("model/") and {entries[name].dtype, wanted[name].dtype} == KEPT:
            found[name] = replace(wanted[name], dtype=entries[name].dtype)
    return found


def read_cast(checkpoint: Checkpoint, target: Tensor, name: str, start: tuple[int, ...]) -> None:
    """Fill `target` with a box of an entry, which may be of the other dtype of `KEPT`."""
    kind = dtype_of(checkpoint.entries[name].dtype)
    if target.dtype == kind:
        checkpoint.read_into(target, name, start)
        return
    found = torch.empty(target.shape, dtype=kind)
    checkpoint.read_into(found, name, start)
    target.copy_(found)
