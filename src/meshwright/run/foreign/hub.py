"""Hugging Face's folders: safetensors, an index of shards, a configuration. Weights only."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import sync_folder, write_file
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.checkpoint.region import Region, whole
from meshwright.run.foreign.mapped import bytes_of
from meshwright.run.foreign.source import Item, Source, bare, tensor_of
from meshwright.run.weights import COMPANIONS, INDEX, SHARD_BYTES, SINGLE, read

__all__ = ["open_hub", "write_hub"]

_CODES: Final[Mapping[str, str]] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_NAMES: Final = {name: code for code, name in _CODES.items()}


def open_hub(path: Path) -> Source:
    """A safetensors file, an index, or a folder with one of them.

    Raises:
        StorageError: it is none, or is damaged or incomplete.
    """
    weights = read(path)
    items: dict[str, Item] = {}
    for name, entry in weights.entries.items():
        if entry.dtype not in _CODES:
            raise StorageError(f"{entry.file}: {name!r} is of dtype {entry.dtype}, not known here")
        items[f"model/{name}"] = Item(_CODES[entry.dtype], entry.shape, entry.file.name)

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        yield whole(items[name].shape), weights.tensor(bare(name))

    return Source("safetensors", path, items, boxes, lambda: "nothing")


def write_hub(
    source: Source, folder: Path, config: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write weights and buffers as `from_pretrained` reads them; file's name by global name.

    One tensor is in memory at a time, and none where it lies in one piece.
    """
    named = {bare(name): name for name in source.weights}
    groups = _grouped({own: source.items[name].bytes for own, name in named.items()}, shard_bytes)
    where: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = SINGLE if len(groups) == 1 else several
        _write(source, folder / file, {own: named[own] for own in names})
        where |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(source.items[name].bytes for name in named.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_file(folder / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
    for beside in _companions(config or source.path):
        shutil.copyfile(beside, folder / beside.name)
    sync_folder(folder)
    return {named[own]: file for own, file in where.items()}


def _companions(config: Path) -> list[Path]:
    """`config.json` and the tokenizer's files beside weights."""
    folder = config if config.is_dir() else config.parent
    return [file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()]


def _grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in groups of at most `limit` bytes, or of one; one group where there are none."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(sizes):
        if groups[-1] and held + sizes[name] > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += sizes[name]
    return groups


def _write(source: Source, path: Path, names: Mapping[str, str]) -> None:
    # Widest first keeps every tensor aligned to its items.
    widths = {own: dtype_of(source.items[name].dtype).itemsize for own, name in names.items()}
    order = sorted(names, key=lambda own: (-widths[own], own))

    def chunks() -> Iterator[memoryview | bytes]:
        yield _header({own: source.items[names[own]] for own in order})
        for own in order:
            yield from bytes_of(tensor_of(source, names[own]))

    write_file(path, chunks())


def _header(items: Mapping[str, Item]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for own, item in items.items():
        end = offset + item.bytes
        table[own] = {
            "dtype": _NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
