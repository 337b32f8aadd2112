"""Tensors that lie in files, mapped rather than read: memory holds what is being looked at."""

from __future__ import annotations

import io
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import opened

__all__ = ["Lies", "Window", "bytes_of", "check", "mapped", "window"]

_CHUNK: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Lies:
    """Where a tensor lies.

    Attributes:
        folder: the one that holds its file.
        file: the file's name.
        begin: the byte of its first element.
        dtype: of its elements.
        shape: of the tensor.
        stride: elements to go on by, per dim.
        storage: first byte and length of what the checksum is of.
        crc: the CRC-32 of the storage, or None where the file has none.
    """

    folder: Path
    file: str
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: tuple[int, int]
    crc: int | None = None

    @property
    def elements(self) -> int:
        """From the first element to the last, those between that it skips included."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


@final
class Window(io.RawIOBase):
    """`length` bytes of an open file from `start` on, as a file."""

    def __init__(self, file: int, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte of the window."""
        base = (0, self._place, self._length)[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        """Which byte comes next."""
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read on, to the window's end at most."""
        wanted = max(0, min(len(buffer), self._length - self._place))
        data = os.pread(self._file, wanted, self._start + self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextmanager
def window(
    folder: Path, name: str, start: int = 0, length: int | None = None
) -> Iterator[tuple[io.BufferedReader, int]]:
    """The bytes of a file, or some of them, as a file; and how many they are.

    Raises:
        StorageError: it cannot be opened, or is shorter.
    """
    with opened(folder, name) as file:
        size = os.fstat(file).st_size
        wanted = size - start if length is None else length
        if start < 0 or wanted < 0 or start + wanted > size:
            raise StorageError(
                f"{name} has {size:,} bytes, but what lies in it goes to byte {start + wanted:,}"
            )
        yield io.BufferedReader(Window(file, start, wanted)), wanted


def mapped(where: Lies) -> Tensor:
    """The tensor, mapped from its file; its bytes are read when it is.

    Raises:
        StorageError: the file is missing, or ends before the tensor does.
    """
    item = where.dtype.itemsize
    length = where.elements * item
    if not length:
        return torch.empty(where.shape, dtype=where.dtype)
    first = where.begin - where.begin % mmap.ALLOCATIONGRANULARITY
    with opened(where.folder, where.file) as file:
        if os.fstat(file).st_size < where.begin + length:
            raise StorageError(f"{where.file} ends before byte {where.begin + length:,}: cut short")
        # A copy on write: torch warns of memory that cannot be written.
        held = mmap.mmap(file, where.begin - first + length, access=mmap.ACCESS_COPY, offset=first)
    flat = torch.frombuffer(held, dtype=torch.uint8, count=length, offset=where.begin - first)
    if where.begin % item:
        flat = flat.clone()
    return flat.view(where.dtype).as_strided(where.shape, where.stride)


def check(where: Lies, name: str) -> bool:
    """Compare a tensor's storage with its checksum; whether there was one.

    Raises:
        StorageError: they differ; names file and tensor.
    """
    if where.crc is None:
        return False
    found, (begin, length) = 0, where.storage
    with window(where.folder, where.file, begin, length) as (stream, _):
        while chunk := stream.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    if found != where.crc:
        raise StorageError(
            f"{where.file} is damaged: the CRC-32 of {name!r} is {found:08x}, "
            f"{where.crc:08x} was written"
        )
    return True


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order, in chunks; without a copy where they lie so."""
    if not tensor.numel():
        return
    dense = tensor.detach().contiguous().resolve_conj().resolve_neg()
    data = dense.reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), _CHUNK):
        yield data[begin : begin + _CHUNK]
