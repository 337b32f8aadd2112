"""A tier: memory beside the device's, where tensors rest and are brought back from.

`put` and `fetch` start a transfer on a thread and return at once; its `wait` ends it. Transfers of
one place happen in the order in which they were asked for, others side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from meshwright.errors import StorageError

__all__ = ["PATIENCE", "Moved", "Place", "Tier", "Transfer", "bytes_of", "done"]

PATIENCE = 600.0
"""Seconds that a transfer may take."""


@dataclass(slots=True)
class Moved:
    """Bytes that went to a tier and came from it."""

    put: int = 0
    fetched: int = 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer under way.

    Attributes:
        what: for errors: the tensor and where it rests.
        seconds: it may take.
        parts: its pieces of work.
        ended: called once it is done, by whoever waits.
    """

    what: str
    seconds: float
    parts: Sequence[Future[None]]
    ended: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way."""
        return all(part.done() for part in self.parts)

    def wait(self) -> None:
        """Until it is done.

        Raises:
            StorageError: it failed, or took too long.
        """
        deadline = time.monotonic() + self.seconds
        for part in self.parts:
            try:
                part.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise StorageError(
                    f"{self.what}: the transfer has not ended in {self.seconds:g} s; the disk "
                    "hangs or is too slow: offload to another folder, or to host"
                ) from None
        self.ended()


def done(what: str = "") -> Transfer:
    """A transfer of nothing."""
    return Transfer(what, 0.0, ())


@dataclass(slots=True)
class Place:
    """Where a tensor rests.

    Attributes:
        name: of the tensor.
        shape, dtype: of it.
        last: the newest transfer from or to it.
        begin: of its bytes within the tier's file.
        digests: of its chunks, once it was put.
        rests: what can be read of it where it rests.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rests: Tensor
    begin: int = 0
    digests: list[str] = field(default_factory=list)
    last: Transfer = field(default_factory=done)

    @property
    def bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor may rest here."""
        return tuple(tensor.shape) == self.shape and tensor.dtype == self.dtype


class Tier(Protocol):
    """Memory beside the device's."""

    @property
    def moved(self) -> Moved:
        """What went and came so far."""

    @property
    def bytes(self) -> int:
        """That tensors rest in."""

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Place:
        """Room for a tensor; it holds zeros."""

    def put(self, place: Place, tensor: Tensor) -> Transfer:
        """Copy a tensor there; it must not change before the transfer is done."""

    def fetch(self, place: Place, out: Tensor) -> Transfer:
        """Copy what rests there into `out`, a contiguous tensor."""

    def settle(self, place: Place) -> Tensor:
        """What rests there, for reading only, after all transfers, and known to be whole."""

    def close(self) -> None:
        """Give the room back."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data
