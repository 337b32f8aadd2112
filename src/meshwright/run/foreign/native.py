"""Meshwright's own checkpoints as a source, and any source written as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.checkpoint.region import Region
from meshwright.run.checkpoint.save import Checkpoint, Piece, open_checkpoint, save
from meshwright.run.foreign.source import Item, Source

__all__ = ["IMPORTED", "open_native", "write_native"]

IMPORTED: Mapping[str, Any] = {
    "plan": "imported",
    "batch_size": None,
    "seed": None,
    "optimizer": {"class": None, "groups": [], "state": {}},
    "scheduler": None,
    "data": None,
    "extra": {},
}
"""What a checkpoint says of a run that Meshwright did not see: nothing, the job's own counts."""


def open_native(path: Path) -> Source:
    """A checkpoint's folder.

    Raises:
        StorageError: it is none.
    """
    checkpoint = open_checkpoint(path)
    items = {
        name: Item(
            entry.dtype,
            entry.shape,
            entry.pieces[0].file if entry.pieces else "",
            len(entry.pieces),
        )
        for name, entry in checkpoint.entries.items()
    }

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        for piece in checkpoint.entries[name].pieces:
            region = piece.region
            yield region, checkpoint.read(name, region.start, region.shape)

    return Source(
        "meshwright",
        path,
        items,
        boxes,
        lambda: _checked(checkpoint),
        checkpoint.step,
        checkpoint.meta,
    )


def _checked(checkpoint: Checkpoint) -> str:
    checkpoint.verify()
    return "digests"


def write_native(source: Source, aside: Path) -> Path:
    """Write a checkpoint inside `aside`; its folder there. One box is in memory at a time."""
    meta = dict(IMPORTED if source.meta is None else source.meta)
    if source.meta is None:
        meta["imported"] = source.format
    group = Group.world(1)
    pieces = list(_pieces(source))
    (folder,) = run_local([save(aside, source.step or 0, pieces, meta, group, 0)])
    path: Path = folder
    return path


def _pieces(source: Source) -> Iterator[Piece]:
    for name, item in source.items.items():
        found = False
        for region, tensor in source.boxes(name):
            found = True
            yield Piece(name, item.shape, region.start, tensor)
        if not found:
            nothing = torch.empty(item.shape, dtype=dtype_of(item.dtype))
            yield Piece(name, item.shape, (0,) * len(item.shape), nothing)
