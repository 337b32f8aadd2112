"""Host memory that tensors pass through: as much as the largest chunk, taken again for each."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from meshwright.run.offload.host import shared

__all__ = ["Staging"]

_ALIGNED = 4096  # past the page cache a disk reads and writes whole pages in place


@final
class Staging:
    """Room for the tensors of one chunk at a time."""

    def __init__(self, name: str) -> None:
        """`name` says in errors what passes through."""
        self._name = name
        self._room = torch.empty(0, dtype=torch.uint8)
        self._at = 0

    @property
    def bytes(self) -> int:
        """That it takes."""
        return self._room.numel()

    def begin(self, tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Give up what is in it, and have room for these."""
        need = sum(map(_room, tensors))
        if need > self.bytes:
            self._room = shared(self._name, need)
        self._at = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor of those that there is room for."""
        size = math.prod(shape) * dtype.itemsize
        found = self._room[self._at : self._at + size]
        self._at += _room((shape, dtype))
        return found.view(dtype).view(shape)


def _room(tensor: tuple[tuple[int, ...], torch.dtype]) -> int:
    size = math.prod(tensor[0]) * tensor[1].itemsize
    return size + -size % _ALIGNED
