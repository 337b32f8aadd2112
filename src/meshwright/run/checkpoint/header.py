"""The header of a safetensors file: made for a shard, and read from one without believing it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import StorageError

__all__ = ["HEADER_BYTES", "Place", "dtype_name", "dtype_of", "made", "parsed"]

HEADER_BYTES = 100_000_000  # what safetensors itself accepts
_ALIGNED = 64  # data that begins so is read straight into tensors' memory

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
_NAMES: Mapping[str, str] = {code: str(d).removeprefix("torch.") for d, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its file: [begin, end) in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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


def made(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a file with these tensors, in their order, end to end."""
    table: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        code = _CODES[tensor.dtype]
        table[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text


def parsed(header: bytes, size: int) -> dict[str, Place]:
    """Where the tensors of a file of `size` bytes lie, by name.

    Raises:
        StorageError: it is no header of such a file: its data are not end to end.
    """
    try:
        table = json.loads(header[8:].decode())
        places = {key: _place(key, told, len(header)) for key, told in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StorageError(f"its header is none of safetensors: {str(error)[:200]!a}") from None
    at = len(header)
    for key, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != at or place.end < at:
            raise StorageError(f"its data have a gap or overlap at {key[:200]!a}")
        at = place.end
    if at != size:
        raise StorageError(f"its header tells of {at:,} bytes, the file has {size:,}")
    return places


def _place(key: str, told: Any, base: int) -> Place:
    begin, end = told["data_offsets"]
    shape = tuple(told["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{key[:80]} has sizes that are no numbers")
    return Place(_NAMES[told["dtype"]], shape, base + begin, base + end)
