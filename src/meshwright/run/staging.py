"""Copies of a rank's state in memory that is kept: what a save costs the steps.

Memory is taken at the first save that needs it, in large pages where the kernel gives them, and
used again by every later save: a page that is touched first costs more than its copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import replace
from typing import final

import psutil
import torch
from torch import Tensor

from meshwright.run.checkpoint import Piece

__all__ = ["Buffers", "bytes_needed", "copied"]

_ALIGNED = 64


@final
class Buffers:
    """Memory for `most` copies of the state, of which each is one save's at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._free: list[Tensor] = []
        self.taken = 0

    def take(self, size: int) -> Tensor | None:
        """Memory for `size` bytes; None where this host has none left for it.

        What was kept for states of another size is given back first.
        """
        assert self.taken < self.most
        self._free = [buffer for buffer in self._free if buffer.numel() == size]
        if self._free:
            self.taken += 1
            return self._free.pop()
        if size > psutil.virtual_memory().available // 2:
            return None
        try:
            buffer = _memory(size)
        except (MemoryError, OSError):
            return None
        self.taken += 1
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Keep it for the next save."""
        self.taken -= 1
        self._free.append(buffer)

    def drop(self) -> None:
        """A buffer that was taken does not come back: a thread may read it for ever."""
        self.taken -= 1


def _memory(size: int) -> Tensor:
    """Bytes that no other process sees."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def bytes_needed(pieces: Iterable[Piece]) -> int:
    """What copies of the pieces that this rank writes take."""
    return sum(_room(piece.tensor) for piece in pieces if piece.primary)


def copied(pieces: Iterable[Piece], buffer: Tensor) -> list[Piece]:
    """The pieces that this rank writes, their tensors in `buffer`."""
    found, at = [], 0
    for piece in pieces:
        if not piece.primary:
            continue
        tensor = piece.tensor.detach()
        room = buffer[at : at + tensor.numel() * tensor.element_size()]
        copy = room.view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        found.append(replace(piece, tensor=copy))
        at += _room(tensor)
    return found


def _room(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return size + -size % _ALIGNED
