"""torch's distributed checkpoints (DCP) read: a pickled table of contents, and chunks of tensors.

    .metadata          names, shapes, chunks; which file holds each chunk, from which byte on
    __0_0.distcp       one `torch.save` after another, each of one chunk

The table is read as symbols (`unpickled`); a call of it that DCP's own classes do not explain is
refused. There are no digests; each chunk's archive has CRC-32s.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import opened, read_small
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.checkpoint.region import Region
from meshwright.run.foreign.mapped import Lies, check, mapped
from meshwright.run.foreign.source import Item, Source, require_tiled, shown
from meshwright.run.foreign.symbols import Global, Made
from meshwright.run.foreign.torchfile import TYPES, open_torch
from meshwright.run.foreign.unpickled import PICKLE_BYTES, allow, unpickled

__all__ = ["METADATA", "open_dcp"]

METADATA: Final = ".metadata"
_HOME: Final = "torch.distributed.checkpoint.metadata"
_CLASSES: Final = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_MAKERS: Final = {
    *(Global(_HOME, name) for name in _CLASSES),
    Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    Global("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    Global("torch.serialization", "_get_layout"),
    Global("torch", "Size"),
    Global("collections", "OrderedDict"),
    Global("pathlib", "PosixPath"),
    Global("pathlib", "Path"),
    Global("pathlib._local", "PosixPath"),
}
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_SLOT: Final = re.compile(r"state\.(.+)\.([^.]+)", re.DOTALL)
_OPTIMIZERS: Final = frozenset({"optim", "optimizer"})
_MODELS: Final = frozenset({"model", "module", "state_dict"})


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor, and the bytes of its archive."""

    region: Region
    file: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the table."""

    dtype: Any
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def open_dcp(folder: Path) -> Source:
    """A folder that `torch.distributed.checkpoint.save` wrote.

    Raises:
        StorageError: it is none, its table claims what cannot be, or a file is missing or short.
    """
    data = read_small(folder, METADATA, PICKLE_BYTES)
    if len(data) > PICKLE_BYTES:
        raise StorageError(f"{METADATA} has more than {PICKLE_BYTES:,} bytes")
    try:
        table = unpickled(data)
        allow(table, _MAKERS)
        state = _state(table, "Metadata")
        entries, others = _entries(state)
    except StorageError as error:
        raise StorageError(f"{METADATA} cannot be used: {error}") from None
    _require_files(folder, entries)
    names = _global_names(entries, state.get("planner_data"))
    found = {names[own]: entry for own, entry in entries.items()}
    items = {
        name: Item(
            dtype_name(entry.dtype), entry.shape, entry.chunks[0].file if entry.chunks else "",
            len(entry.chunks),
        )
        for name, entry in found.items()
    }  # fmt: skip

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        for chunk in found[name].chunks:
            if chunk.region.volume:
                yield chunk.region, mapped(_lies(folder, name, found[name], chunk))

    return Source(
        "dcp",
        folder,
        items,
        boxes,
        lambda: _checked(folder, found),
        notes=_notes(folder, entries, others),
    )


def _state(value: Any, name: str) -> Mapping[str, Any]:
    """The fields of an object of one of DCP's classes."""
    if not isinstance(value, Made) or value.maker.name != name or not isinstance(value.state, dict):
        raise StorageError(f"there is no {name} where one belongs")
    return value.state


def _field(state: Mapping[str, Any], name: str, kind: type) -> Any:
    value = state.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StorageError(f"the field {name} is no {kind.__name__}")
    return value


def _entries(state: Mapping[str, Any]) -> tuple[dict[str, _Entry], list[str]]:
    """Tensors by their own name, and the names of what is no tensor."""
    places = _places(_field(state, "storage_data", dict))
    entries: dict[str, _Entry] = {}
    others: list[str] = []
    for own, value in _field(state, "state_dict_metadata", dict).items():
        if not isinstance(own, str) or not own.isprintable() or not own:
            raise StorageError(f"the name {shown(str(own))!r} is no text of printable characters")
        if isinstance(value, Made) and value.maker.name == "BytesStorageMetadata":
            others.append(own)
        else:
            entries[own] = _entry(own, _state(value, "TensorStorageMetadata"), places)
    return entries, others


def _places(data: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """File, first byte and length by name and offset."""
    found: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, info in data.items():
        where, what = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        offset = () if where.get("offset") is None else _size(where["offset"])
        key = (_field(where, "fqn", str), offset)
        if key in found:
            raise StorageError(f"{shown(key[0])} at {list(offset)} stands twice")
        file = _field(what, "relative_path", str)
        if not _FILE.fullmatch(file):
            raise StorageError(f"{shown(file)!r} is no plain file name inside the checkpoint")
        if what.get("transform_descriptors"):
            raise StorageError(
                f"{shown(key[0])} was written through an extension; save it again without"
            )
        place = (_count(_field(what, "offset", int)), _count(_field(what, "length", int)))
        found[key] = (file, *place)
    return found


def _entry(
    own: str,
    state: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]],
) -> _Entry:
    shape = _size(state.get("size"))
    chunks: list[_Chunk] = []
    for value in _field(state, "chunks", list):
        chunk = _state(value, "ChunkStorageMetadata")
        region = Region(_size(chunk.get("offsets")), _size(chunk.get("sizes")))
        place = places.get((own, region.start))
        if place is None:
            raise StorageError(
                f"{shown(own)}: no file is told for the chunk at {list(region.start)}"
            )
        chunks.append(_Chunk(region, *place))
    require_tiled(own, shape, [chunk.region for chunk in chunks])
    return _Entry(_dtype(own, state.get("properties")), shape, tuple(chunks))


def _dtype(own: str, properties: Any) -> Any:
    state = properties.state if isinstance(properties, Made) else None
    name = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(name, Global) or name.module != "torch" or name.name not in TYPES:
        raise StorageError(f"{shown(own)} is of a dtype that is not known: {shown(str(name))}")
    return TYPES[name.name]


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, Made) and value.maker.name == "Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > 16:
        raise StorageError("a size is no tuple of numbers")
    return tuple(_count(number) for number in value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise StorageError(f"{shown(str(value))} is no count")
    return value


def _require_files(folder: Path, entries: Mapping[str, _Entry]) -> None:
    """Every file is there and long enough, and no two chunks share some of their bytes only."""
    claims: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for own, entry in entries.items():
        for chunk in entry.chunks:
            claims[chunk.file][chunk.begin, chunk.begin + chunk.length] = own
    for file, spans in claims.items():
        last, end = "", 0
        for (begin, stop), own in sorted(spans.items()):
            if begin < end:
                raise StorageError(f"{file}: {shown(own)} and {shown(last)} share bytes")
            last, end = own, stop
        with opened(folder, file) as handle:
            size = os.fstat(handle).st_size
        if size < end:
            raise StorageError(
                f"{file} has {size:,} bytes, but {shown(last)} goes to byte {end:,}: cut short"
            )


def _lies(folder: Path, name: str, entry: _Entry, chunk: _Chunk) -> Lies:
    """Where a chunk's tensor lies, which must be what the table says."""
    found = open_torch(folder, chunk.file, chunk.begin, chunk.length)
    if not isinstance(found, Lies):
        raise StorageError(f"{chunk.file}: {shown(name)} is no tensor there")
    if found.dtype != entry.dtype or found.shape != chunk.region.shape:
        raise StorageError(
            f"{chunk.file}: {shown(name)} at {list(chunk.region.start)} is {found.dtype} "
            f"{list(found.shape)}, the table says {entry.dtype} {list(chunk.region.shape)}"
        )
    return found


def _checked(folder: Path, entries: Mapping[str, _Entry]) -> str:
    sums = [
        check(_lies(folder, name, entry, chunk), name)
        for name, entry in entries.items()
        for chunk in entry.chunks
        if chunk.region.volume
    ]
    return "crc32" if sums and all(sums) else "nothing"


def _notes(folder: Path, entries: Mapping[str, _Entry], others: list[str]) -> tuple[str, ...]:
    notes = []
    if others:
        some = ", ".join(map(shown, others[:3])) + (", ..." if len(others) > 3 else "")
        notes.append(f"{len(others)} values that are no tensors are left out ({some})")
    used = {chunk.file for entry in entries.values() for chunk in entry.chunks}
    extra = sorted(f.name for f in folder.glob("*.distcp") if f.name not in used)
    if extra and not others:
        notes.append(f"{shown(extra[0])} is there, but the table names nothing in it")
    return tuple(notes)


# ── whose state it is ───────────────────────────────────────────────────────────────────────────


def _global_names(entries: Mapping[str, _Entry], planner: Any) -> dict[str, str]:
    """Meshwright's name for each of DCP's, by the path that it had in the state dict."""
    paths = {own: _path(own, planner) for own in entries}
    heads = {path[0] for path in paths.values()}
    if len(heads) == 1 and not heads & (_MODELS | _OPTIMIZERS):
        inner = {path[1] for path in paths.values() if len(path) > 1}
        if inner and inner <= _MODELS | _OPTIMIZERS:
            paths = {own: path[1:] for own, path in paths.items()}
    found = {own: _global_name(own, path) for own, path in paths.items()}
    if len(set(found.values())) != len(found):
        twice = next(name for name in found.values() if [*found.values()].count(name) > 1)
        raise StorageError(f"{METADATA}: two tensors mean {shown(twice)}")
    return found


def _path(own: str, planner: Any) -> tuple[str, ...]:
    path = planner.get(own) if isinstance(planner, dict) else None
    return tuple(map(str, path)) if isinstance(path, tuple) and path else (own,)


def _global_name(own: str, path: tuple[str, ...]) -> str:
    rest = ".".join(path[1:])
    if path[0] in _OPTIMIZERS and (slot := _SLOT.fullmatch(rest)):
        return f"optimizer/{slot[2]}/{slot[1]}"
    if path[0] in _MODELS and rest:
        return f"model/{rest}"
    return f"model/{own}"
