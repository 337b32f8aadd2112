"""Files as `torch.save` writes them, tensor after tensor, so that `torch.load` reads them.

Written here because `torch.save` wants all tensors at once, and because a pickle is only written
where a format of others is one.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, final

import torch

from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.foreign.mapped import bytes_of
from meshwright.run.foreign.pickled import pickled
from meshwright.run.foreign.source import Item, Source, tensor_of
from meshwright.run.foreign.symbols import Global, Made, Persistent
from meshwright.run.foreign.torchfile import STORAGES

__all__ = ["Stored", "archive", "rebuilt", "stored", "write_torch"]

_ALIGNED: Final = 64  # as torch aligns, so that its mmap=True can be used
_ZIP64: Final = 1 << 31
_CLASSES: Final = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A storage to be written: its length, and its bytes when their turn comes."""

    length: int
    chunks: Callable[[], Iterator[memoryview]]


def stored(source: Source, name: str) -> Stored:
    """A source's tensor as a storage of its own."""
    return Stored(source.items[name].bytes, lambda: bytes_of(tensor_of(source, name)))


def rebuilt(key: str, item: Item) -> Made:
    """The call that makes a tensor of the storage `key`."""
    dtype, count = dtype_of(item.dtype), math.prod(item.shape)
    known = dtype in _CLASSES
    kind = Global("torch", _CLASSES[dtype]) if known else Global("torch.storage", "UntypedStorage")
    size = count if known else count * dtype.itemsize
    storage = Persistent(("storage", kind, key, "cpu", size))
    args = (storage, 0, item.shape, _strides(item.shape), False, Made(_ORDERED))
    if known:
        return Made(Global("torch._utils", "_rebuild_tensor_v2"), args)
    name = str(dtype).removeprefix("torch.")
    return Made(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", name)))


_ORDERED: Final = Global("collections", "OrderedDict")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def archive(out: IO[bytes], tree: Any, storages: Mapping[str, Stored]) -> None:
    """Write an archive from where `out` is on.

    Args:
        out: a file that can be sought in.
        tree: symbols; tensors by `rebuilt`.
        storages: what those are made of, by key.
    """
    with zipfile.ZipFile(_From(out), "w", zipfile.ZIP_STORED) as made:
        data = pickled(tree)
        _member(made, "archive/data.pkl", Stored(len(data), lambda: iter([memoryview(data)])))
        _small(made, "archive/.format_version", b"1")
        _small(made, "archive/.storage_alignment", str(_ALIGNED).encode())
        _small(made, "archive/byteorder", b"little")
        for key, storage in storages.items():
            _member(made, f"archive/data/{key}", storage)
        _small(made, "archive/version", b"3\n")


def _small(made: zipfile.ZipFile, name: str, data: bytes) -> None:
    _member(made, name, Stored(len(data), lambda: iter([memoryview(data)])))


def _member(made: zipfile.ZipFile, name: str, what: Stored) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = what.length
    large = what.length >= _ZIP64
    head = 30 + len(name) + (20 if large else 0) + 4
    pad = -(made.start_dir + head) % _ALIGNED
    info.extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
    with made.open(info, "w", force_zip64=large) as member:
        for chunk in what.chunks():
            member.write(chunk)


@final
class _From(io.RawIOBase):
    """A file as if it began where it is now."""

    def __init__(self, out: IO[bytes]) -> None:
        super().__init__()
        self._out, self._origin = out, out.tell()

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes from where it began."""
        return self._out.tell() - self._origin

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte from where it began."""
        base = self._origin if whence == os.SEEK_SET else 0
        return self._out.seek(base + offset, whence) - self._origin

    def write(self, data: Any) -> int:
        """Write on."""
        return self._out.write(data)


def write_torch(path: Path, tree: Any, storages: Mapping[str, Stored]) -> None:
    """Write a new file and sync it.

    Raises:
        OSError: it exists, or the disk refuses.
    """
    with path.open("xb") as out:
        archive(out, tree, storages)
        out.flush()
        os.fsync(out.fileno())
