"""Checkpoints written as torch's distributed ones, as `torch.distributed.checkpoint.load` reads.

The state dict is `{"model": ..., "optimizer": {"state": ..., "param_groups": ...}}`, with the names
that `get_state_dict` gives; a tensor that has several names is stored once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from torch import Tensor

from meshwright.run.checkpoint.durable import sync_folder, write_file
from meshwright.run.checkpoint.plain import from_plain
from meshwright.run.foreign.dcp import METADATA
from meshwright.run.foreign.pickled import pickled
from meshwright.run.foreign.source import Item, Source, bare, kind
from meshwright.run.foreign.symbols import Global, Made
from meshwright.run.foreign.torchwrite import archive, rebuilt, stored

__all__ = ["settings", "write_dcp"]

_FILE: Final = "__0_0.distcp"
_HOME: Final = "torch.distributed.checkpoint.metadata"
_Path = tuple[str, ...]


def write_dcp(source: Source, folder: Path) -> dict[str, str]:
    """Write the checkpoint; file's name by global name. One tensor is in memory at a time."""
    paths = {name: _path(name) for name in source.of("model", "buffer", "optimizer")}
    table: dict[_Path, Made] = {}
    places: dict[_Path, tuple[int, int]] = {}
    with (folder / _FILE).open("xb") as out:
        for name, path in paths.items():
            item = source.items[name]
            places[path] = _append(out, rebuilt("0", item), {"0": stored(source, name)})
            table[path] = _tensor(item)
        for path, value in _settings(source):
            places[path] = _append(out, value, {})
            table[path] = _new("BytesStorageMetadata", {})
        out.flush()
        os.fsync(out.fileno())
    for other, name in source.tied.items():
        if f"model/{name}" in paths:
            first, path = paths[f"model/{name}"], ("model", other)
            table[path], places[path] = table[first], places[first]
    write_file(folder / METADATA, [pickled(_metadata(table, places))])
    sync_folder(folder)
    return dict.fromkeys(paths, _FILE)


def _path(name: str) -> _Path:
    if kind(name) == "optimizer":
        return ("optimizer", "state", bare(name), name.split("/")[1])
    return ("model", bare(name))


def _append(out: IO[bytes], tree: Any, storages: Mapping[str, Any]) -> tuple[int, int]:
    """Write an archive at the file's end: where it begins, and its length."""
    begin = out.seek(0, os.SEEK_END)
    archive(out, tree, storages)
    return begin, out.seek(0, os.SEEK_END) - begin


def settings(source: Source) -> list[dict[str, Any]]:
    """The optimizer's groups, `params` by name, as far as they are plain."""
    groups = (source.meta or {}).get("optimizer", {}).get("groups", [])
    found = []
    for group in groups:
        values = {key: from_plain(value) for key, value in group["settings"].items()}
        known = {key: _number(value) for key, value in values.items()}
        found.append({**known, "params": list(group["parameters"])})
    return found


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _settings(source: Source) -> Iterator[tuple[_Path, Any]]:
    for number, group in enumerate(settings(source)):
        for key, value in group.items():
            yield ("optimizer", "param_groups", str(number), key), value
    plain = (source.meta or {}).get("optimizer", {}).get("state", {})
    for name, slots in plain.items():
        for slot, value in slots.items():
            yield ("optimizer", "state", name, slot), from_plain(value)


def _new(name: str, state: Any, home: str = _HOME) -> Made:
    return Made(Global(home, name), (), new=True, state=state)


def _size(shape: tuple[int, ...]) -> Made:
    return Made(Global("torch", "Size"), (shape,))


def _tensor(item: Item) -> Made:
    layout = Made(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Made(Global(_HOME, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (Global("torch", item.dtype), layout, False, memory, False)
    chunk = {"offsets": _size((0,) * len(item.shape)), "sizes": _size(item.shape)}
    return _new(
        "TensorStorageMetadata",
        {
            "properties": _new("TensorProperties", properties),
            "size": _size(item.shape),
            "chunks": [_new("ChunkStorageMetadata", chunk)],
        },
    )


def _metadata(table: Mapping[_Path, Made], places: Mapping[_Path, tuple[int, int]]) -> Made:
    storage: dict[Any, Any] = {}
    for path, (begin, length) in places.items():
        index: dict[str, Any] = {"fqn": ".".join(path), "index": None}
        if table[path].maker.name == "TensorStorageMetadata":
            dims = len(table[path].state["size"].args[0])
            index |= {"offset": _size((0,) * dims), "index": 0}
        info = {"relative_path": _FILE, "offset": begin, "length": length}
        place = _new("_StorageInfo", info, "torch.distributed.checkpoint.filesystem")
        storage[_new("MetadataIndex", index)] = place
    return _new(
        "Metadata",
        {
            "state_dict_metadata": {".".join(path): made for path, made in table.items()},
            "planner_data": {".".join(path): _keys(path) for path in table},
            "storage_data": storage,
            "storage_meta": None,
            "version": "1.0.0",
        },
    )


def _keys(path: _Path) -> tuple[str | int, ...]:
    """The path with the numbers of a list as numbers."""
    if path[:2] == ("optimizer", "param_groups"):
        return (*path[:2], int(path[2]), *path[3:])
    return path
