"""The host tier: tensors in the host's memory, outside the rank's private memory.

A rank whose device is the processor keeps them in shared anonymous memory, which the kernel counts
apart (RssShmem), and copies to and from it as it would over a bus.
"""

from __future__ import annotations

import math
import mmap
from functools import partial
from typing import final

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.offload.lane import Lane
from meshwright.run.offload.tier import PATIENCE, Moved, Place, Transfer

__all__ = ["Host", "Pool", "shared"]

_ALIGNED = 64
_ARENA = 1 << 22  # bytes that small tensors are cut from; what nobody touches takes no memory


@final
class Pool:
    """Host memory, handed out tensor by tensor and never taken back."""

    def __init__(self) -> None:
        self.bytes = 0
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._at = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros.

        Raises:
            StorageError: the host has no memory for it.
        """
        size = math.prod(shape) * dtype.itemsize
        room = size + -size % _ALIGNED
        self.bytes += size
        if room > _ARENA // 4:
            return shared(name, room)[:size].view(dtype).view(shape)
        if self._at + room > self._arena.numel():
            self._arena, self._at = shared(name, _ARENA), 0
        found = self._arena[self._at : self._at + size]
        self._at += room
        return found.view(dtype).view(shape)


def shared(name: str, size: int) -> Tensor:
    """Bytes, all zero, that count as shared memory.

    Raises:
        StorageError: the host has none for `name`.
    """
    try:
        memory = mmap.mmap(-1, max(size, 1))  # shared and anonymous, from a page's beginning
    except (OSError, MemoryError) as error:
        raise StorageError(
            f"the host has no {size:,} bytes for {name} ({error}); offload less, or to disk"
        ) from None
    return torch.frombuffer(memory, dtype=torch.uint8)


@final
class Host:
    """Tensors in a pool; one thread copies."""

    def __init__(self, seconds: float = PATIENCE) -> None:
        """Transfers may take `seconds`."""
        self.moved, self.pool = Moved(), Pool()
        self._seconds = seconds
        self._copier = Lane(1, "offload-host")

    @property
    def bytes(self) -> int:
        """That tensors rest in."""
        return self.pool.bytes

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Place:
        """Room for a tensor; it holds zeros."""
        return Place(name, shape, dtype, self.pool.tensor(name, shape, dtype))

    def put(self, place: Place, tensor: Tensor) -> Transfer:
        """Copy a tensor there; it must not change before the transfer is done."""
        self.moved.put += place.bytes
        return self._copy(place, place.rests, tensor)

    def fetch(self, place: Place, out: Tensor) -> Transfer:
        """Copy what rests there into `out`."""
        self.moved.fetched += place.bytes
        return self._copy(place, out, place.rests)

    def settle(self, place: Place) -> Tensor:
        """What rests there, after all transfers."""
        place.last.wait()
        return place.rests

    def close(self) -> None:
        """No more transfers; memory goes with the last tensor in it."""
        self._copier.close()

    def _copy(self, place: Place, into: Tensor, source: Tensor) -> Transfer:
        work = self._copier.submit(partial(_copied, into, source.detach()))
        what = f"{place.name} in host memory"
        place.last = Transfer(what, self._seconds, (work,))
        return place.last


def _copied(into: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        into.copy_(source)
