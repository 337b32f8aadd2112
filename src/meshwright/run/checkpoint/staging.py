"""Copies of a rank's state in memory that is kept: what a save costs the steps.

A page that is touched first costs several times its copy. So memory is touched by a thread before
it is needed where somebody knows that it will be, and is used again by every later save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import final

import psutil
import torch
from torch import Tensor

from meshwright.run.checkpoint.save import Piece
from meshwright.run.checkpoint.task import Task

__all__ = ["Buffers", "bytes_needed", "copied"]

_ALIGNED = 64


@final
class Buffers:
    """Memory for `most` copies of the state, of which each is one save's at a time.

    Attributes:
        taken: copies that saves have.
        bytes: the most that all copies took.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self.bytes = 0
        self._free: list[Tensor] = []
        self._coming: Task[Tensor | None] | None = None

    def prepare(self, size: int) -> None:
        """Begin to make memory for the first save of `size` bytes, on a thread."""
        if not self._free and not self.taken and self._coming is None:
            self._coming = Task(lambda: _touched(size), "save-memory")

    def take(self, size: int) -> Tensor | None:
        """Memory for `size` bytes; None where this host has none left for it.

        What was kept for states of another size is given back first.
        """
        assert self.taken < self.most
        self._receive()
        self._free = [buffer for buffer in self._free if buffer.numel() == size]
        buffer = self._free.pop() if self._free else _memory(size)
        self.taken += buffer is not None
        self.bytes = max(self.bytes, (self.taken + len(self._free)) * size)
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Keep it for the next save."""
        self.taken -= 1
        self._free.append(buffer)

    def drop(self) -> None:
        """A buffer that was taken does not come back: a thread may read it for ever."""
        self.taken -= 1

    def _receive(self) -> None:
        """Take over what a thread has made; where it has not ended yet, nobody made it."""
        coming, self._coming = self._coming, None
        if coming is not None and coming.wait(_MAKING) and (made := coming.result()) is not None:
            self._free.append(made)


_MAKING = 10.0  # seconds: memory that takes so long is no gain


def _memory(size: int) -> Tensor | None:
    """Bytes, where this host has twice as many."""
    if size > psutil.virtual_memory().available // 2:
        return None
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (MemoryError, RuntimeError):  # torch's allocator raises the latter
        return None


def _touched(size: int) -> Tensor | None:
    memory = _memory(size)
    return None if memory is None else memory.zero_()


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
