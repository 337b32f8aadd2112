"""One rank's file of a checkpoint: safetensors, written and read with a digest per tensor.

The header is written here rather than by safetensors, so that digests are of what was in memory
(a disk that changes a byte is found out), and no second copy of the shard is ever made.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.durable import opened, write_file
from meshwright.run.manifest import Entry, File, Stored
from meshwright.run.region import Region

__all__ = ["Shards", "dtype_name", "dtype_of", "key_of", "write_shard"]

_CHUNK = 8 << 20
_HEADER_BYTES = 100_000_000  # what safetensors itself accepts

_CODES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES: Mapping[str, torch.dtype] = {str(d).removeprefix("torch."): d for d in _CODES}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a manifest's dtype name."""
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype as a manifest names it.

    Raises:
        StorageError: safetensors has no such dtype.
    """
    if dtype not in _CODES:
        raise StorageError(f"a checkpoint cannot hold {dtype}; it can: {', '.join(_DTYPES)}")
    return str(dtype).removeprefix("torch.")


def key_of(name: str, start: tuple[int, ...]) -> str:
    """A piece's name in its file: `model/head@4,0` is the piece of model/head that starts there."""
    return f"{name}@{','.join(map(str, start))}"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> tuple[File, dict[str, str]]:
    """Write tensors to a new safetensors file; its claim, and the sha256 of each tensor's bytes.

    Besides the tensors at most one contiguous copy of one of them is held in host memory.

    Raises:
        OSError: the disk refuses.
    """
    # Widest first keeps every tensor aligned to its items.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header = _header({key: tensors[key] for key in order})
    digests: dict[str, str] = {}

    def chunks() -> Iterator[memoryview | bytes]:
        yield header
        for key in order:
            digest = hashlib.sha256()
            for chunk in _bytes_of(tensors[key]):
                digest.update(chunk)
                yield chunk
            digests[key] = digest.hexdigest()

    length = write_file(path, chunks())
    return File(length, hashlib.sha256(header).hexdigest()), digests


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    table: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        code = _CODES[tensor.dtype]
        table[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, in chunks."""
    if not tensor.numel():
        return
    dense = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    data = dense.reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), _CHUNK):
        yield data[begin : begin + _CHUNK]


@final
class Shards:
    """The files of one checkpoint, opened when first read; each piece is checked before its use."""

    def __init__(self, folder: Path, files: Mapping[str, File]) -> None:
        """The files that lie in `folder` by the names and lengths of `files`."""
        self._folder = folder
        self._files = files
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._checked: set[tuple[str, str]] = set()

    def close(self) -> None:
        """Close all files."""
        self._handles.clear()
        self._checked.clear()
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
        """Compare a piece's bytes with its digest, once.

        Raises:
            StorageError: names file, entry, region, expected and read digest.
        """
        self._piece(name, entry, piece)

    def copy(self, name: str, entry: Entry, piece: Stored, region: Region, target: Tensor) -> None:
        """Copy `region`, which lies inside `piece`, to `target` of the same shape.

        Raises:
            StorageError: as `check`.
        """
        source = self._piece(name, entry, piece)
        target.copy_(source[region.slices(piece.region.start)])

    def _piece(self, name: str, entry: Entry, piece: Stored) -> Tensor:
        """The piece, mapped from its file, not copied."""
        key = key_of(name, piece.region.start)
        try:
            tensor: Tensor = self._handle(piece.file).get_tensor(key)
        except SafetensorError as error:
            raise StorageError(f"{piece.file} does not hold {key!r}: {error}") from None
        if tuple(tensor.shape) != piece.region.shape or tensor.dtype != dtype_of(entry.dtype):
            raise StorageError(
                f"{piece.file}: {key!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {entry.dtype} {list(piece.region.shape)}"
            )
        if (piece.file, key) not in self._checked:
            self._compare(name, piece, tensor)
            self._checked.add((piece.file, key))
        return tensor

    def _compare(self, name: str, piece: Stored, tensor: Tensor) -> None:
        digest = hashlib.sha256()
        for chunk in _bytes_of(tensor):
            digest.update(chunk)
        if digest.hexdigest() != piece.sha256:
            raise StorageError(
                f"{piece.file} does not match its digest: entry {name!r} at "
                f"{list(piece.region.start)}, shape {list(piece.region.shape)} "
                f"(expected {piece.sha256[:12]}.., read {digest.hexdigest()[:12]}..)"
            )

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            self.check_lengths([name])
            self._check_header(name)
            try:
                handle = safe_open(self._folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise StorageError(f"{name} is no safetensors file: {error}") from None
            self._handles[name] = self._stack.enter_context(handle)
        return self._handles[name]

    def _check_header(self, name: str) -> None:
        with opened(self._folder, name) as file, os.fdopen(os.dup(file), "rb") as stream:
            start = stream.read(8)
            length = min(int.from_bytes(start, "little"), _HEADER_BYTES)
            read = hashlib.sha256(start + stream.read(length)).hexdigest()
        if read != self._files[name].header:
            raise StorageError(
                f"{name}: its header does not match its digest (expected "
                f"{self._files[name].header[:12]}.., read {read[:12]}..)"
            )
