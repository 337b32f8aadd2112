"""Memory for large results, kept warm: what nobody holds any more is handed out again.

A large allocation is fresh memory each time, and its page faults cost as much as a collective.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Pool"]

_SMALL = 1 << 20
_GRAIN = 1 << 21  # of huge pages
_KEPT = 1 << 29
_WASTE = 8
"""How many times as large a block may be as what is put into it."""


@final
class Pool:
    """Hands out tensors; their memory comes back by itself when the last view of it is gone."""

    def __init__(self, kept: int = _KEPT) -> None:
        """`kept`: how many unused bytes to keep at most."""
        self._kept = kept
        self._idle: list[mmap.mmap] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of unknown content."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALL:
            return torch.empty(shape, dtype=dtype)
        block = self._block(size)
        lease = np.frombuffer(block, np.uint8, size)
        # torch holds the array as long as any tensor uses its memory.
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(tuple(shape))

    @property
    def idle(self) -> int:
        """Bytes that are kept and unused."""
        return sum(map(len, self._idle))

    def _block(self, size: int) -> mmap.mmap:
        """The smallest idle block that fits, else a new one.

        Half of it may be wasted, or more: blocks of every size that is ever asked for would take
        1.4 times the memory, all of it for good.
        """
        fitting = [block for block in self._idle if size <= len(block) <= _WASTE * size]
        if fitting:
            best = min(fitting, key=len)
            self._idle.remove(best)
            return best
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        block = mmap.mmap(-1, -(-size // _GRAIN) * _GRAIN, flags)
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        self._idle.append(block)
        while self.idle > self._kept:
            del self._idle[0]
