"""The files of a checkpoint, read: each chunk is compared with its digest, then used.

Bytes go from the file straight into the tensor that is filled, wherever what is wanted lies there
end to end; only chunks at its borders, and boxes cut out of rows, pass through a buffer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.digest import CHUNK, chunks_of, usable
from meshwright.run.checkpoint.durable import opened, read_at
from meshwright.run.checkpoint.header import HEADER_BYTES, Place, dtype_of, parsed
from meshwright.run.checkpoint.manifest import ITEM_BYTES, Entry, File, Stored
from meshwright.run.checkpoint.region import Region, bands, span
from meshwright.run.checkpoint.shard import bytes_of, key_of

__all__ = ["Shards"]

_BAND = 8 * CHUNK  # bytes that are read to cut a box out of them


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file whose header is whole."""

    file: int
    places: Mapping[str, Place]


@dataclass(frozen=True, slots=True)
class _Source:
    """A piece in its file: what is read, and what an error says of it."""

    name: str
    piece: Stored
    file: int
    begin: int
    size: int


@final
class Shards:
    """The files of one checkpoint, opened when first read."""

    def __init__(self, folder: Path, files: Mapping[str, File]) -> None:
        """The files that lie in `folder` by the names and lengths of `files`."""
        self._folder = folder
        self._files = files
        self._stack = ExitStack()
        self._opened: dict[str, _Opened] = {}
        self._memory = memoryview(bytearray())

    @property
    def _buffer(self) -> memoryview:
        """Memory for a chunk that is not read in place."""
        if not self._memory:
            self._memory = memoryview(bytearray(CHUNK))
        return self._memory

    def close(self) -> None:
        """Close all files."""
        self._opened.clear()
        self._stack.close()

    def check_lengths(self, names: Iterable[str]) -> None:
        """Refuse missing and truncated files, at the cost of a look at the folder.

        Raises:
            StorageError: names the file, the expected and the found length.
        """
        for name in names:
            with opened(self._folder, name) as file:
                found = os.fstat(file).st_size
            if found != self._files[name].bytes:
                told = self._files[name].bytes
                how = "it is cut short" if found < told else "it has grown"
                raise StorageError(f"{name} has {found:,} bytes, expected {told:,}: {how}")

    def check(self, name: str, entry: Entry, piece: Stored) -> None:
        """Compare a piece's bytes with its digests.

        Raises:
            StorageError: names file, entry, region, bytes, expected and read digest.
        """
        source = self._source(name, entry, piece)
        for begin, end in chunks_of(source.size):
            self._chunk(source, begin, end, self._buffer[: end - begin])

    def copy(self, name: str, entry: Entry, piece: Stored, region: Region, target: Tensor) -> None:
        """Copy `region`, which lies inside `piece`, to `target` of the same shape.

        Raises:
            StorageError: as `check`.
        """
        source, shape = self._source(name, entry, piece), piece.region.shape
        item = ITEM_BYTES[entry.dtype]
        start = tuple(a - o for a, o in zip(region.start, piece.region.start, strict=True))
        inner = Region(start, region.shape)
        low, high = span(inner, shape)
        straight = high - low == inner.volume and target.device.type == "cpu"
        if straight and target.is_contiguous() and not target.is_conj() and not target.is_neg():
            self._read(source, low * item, high * item, bytes_of(target))
            return
        for band in bands(inner, shape, max(1, _BAND // item)):
            low, high = span(band, shape)
            rows = torch.empty(high - low, dtype=dtype_of(entry.dtype))
            self._read(source, low * item, high * item, bytes_of(rows))
            strides = torch.empty(shape, device="meta").stride()
            target[band.slices(start)].copy_(rows.as_strided(band.shape, strides))

    def _read(self, source: _Source, low: int, high: int, out: memoryview) -> None:
        """Bytes [low, high) of a piece to `out`, by whole chunks."""
        for begin in range(low - low % CHUNK, high, CHUNK):
            end = min(begin + CHUNK, source.size)
            first, last = max(begin, low), min(end, high)
            part = out[first - low : last - low]
            if (first, last) == (begin, end):
                self._chunk(source, begin, end, part)
            else:
                whole = self._buffer[: end - begin]
                self._chunk(source, begin, end, whole)
                part[:] = whole[first - begin : last - begin]

    def _chunk(self, source: _Source, begin: int, end: int, into: memoryview) -> None:
        """Read a chunk of a piece, and compare it with its digest."""
        piece = source.piece
        read_at(source.file, into, source.begin + begin, piece.file)
        expected = piece.digests[begin // CHUNK]
        found = usable(self._files[piece.file].digest)(into)
        if found != expected:
            first, last = source.begin + begin, source.begin + end - 1
            raise StorageError(
                f"{piece.file} does not match its digest: entry {source.name!r} at "
                f"{list(piece.region.start)}, shape {list(piece.region.shape)}, bytes {first:,} to "
                f"{last:,} of the file (expected {expected[:12]}.., read {found[:12]}..)"
            )

    def _source(self, name: str, entry: Entry, piece: Stored) -> _Source:
        key = key_of(name, piece.region.start)
        file = self._file(piece.file)
        place = file.places.get(key)
        if place is None:
            raise StorageError(f"{piece.file} does not hold {key!r}")
        size = piece.region.volume * ITEM_BYTES[entry.dtype]
        told = (place.dtype, place.shape, place.end - place.begin)
        if told != (entry.dtype, piece.region.shape, size):
            raise StorageError(
                f"{piece.file}: {key!r} is {place.dtype} {list(place.shape)} of "
                f"{place.end - place.begin:,} bytes, expected {entry.dtype} "
                f"{list(piece.region.shape)} of {size:,}"
            )
        return _Source(name, piece, file.file, place.begin, size)

    def _file(self, name: str) -> _Opened:
        if name not in self._opened:
            self.check_lengths([name])
            file = self._stack.enter_context(opened(self._folder, name))
            try:
                places = parsed(self._header(name, file), self._files[name].bytes)
            except StorageError as error:
                raise StorageError(f"{name} cannot be used: {error}") from None
            self._opened[name] = _Opened(file, places)
        return self._opened[name]

    def _header(self, name: str, file: int) -> bytes:
        """A file's header, whole."""
        claim = self._files[name]
        start = bytearray(min(8, claim.bytes))
        read_at(file, memoryview(start), 0, name)
        length = min(int.from_bytes(start, "little"), HEADER_BYTES, claim.bytes - len(start))
        header = bytearray(len(start) + length)
        read_at(file, memoryview(header), 0, name)
        found = usable(claim.digest)(memoryview(header))
        if found != claim.header:
            raise StorageError(
                f"its header does not match its digest (expected {claim.header[:12]}.., read "
                f"{found[:12]}..)"
            )
        return bytes(header)
