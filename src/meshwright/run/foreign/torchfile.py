"""What `torch.save` wrote, read without unpickling: its tree of values, tensors where they lie.

    name/data.pkl      a pickle: dicts, lists, numbers, and calls that rebuild tensors of storages
    name/data/0 ...    storages, stored as they are
    name/byteorder     little or big

Files from before torch 1.6 are pickles one after another, and their storages.
"""

from __future__ import annotations

import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, final

import torch

from meshwright.errors import StorageError
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.foreign.mapped import Lies, window
from meshwright.run.foreign.symbols import Global, Made, Persistent
from meshwright.run.foreign.unpickled import PICKLE_BYTES, unpickled

__all__ = ["STORAGES", "TYPES", "leaves", "listed", "open_torch", "shown"]

STORAGES: Final[Mapping[str, torch.dtype]] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_ZIP: Final = b"PK\x03\x04"
_MAGIC: Final = 0x1950A86A20F9469CFC6C
_MEMBERS: Final = 2_000_000
_DIMS: Final = 16
_DEEP: Final = 64
_VALUES: Final = 4_000_000
_REBUILD: Final = {
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_tensor_v3"),
    Global("torch._utils", "_rebuild_tensor"),
}
_PARAMETER: Final = {
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
}
_ORDERED: Final = Global("collections", "OrderedDict")
_SIZE: Final = Global("torch", "Size")


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage's first byte in the file, its length, and its checksum where there is one."""

    begin: int
    length: int
    crc: int | None


@dataclass(frozen=True, slots=True)
class _Opened:
    """Where the storages of a file are, and how many values were looked at."""

    folder: Path
    file: str
    storages: Mapping[str, _Storage]
    seen: Iterator[int] = field(default_factory=itertools.count)


def open_torch(folder: Path, name: str, start: int = 0, length: int | None = None) -> Any:
    """The tree that `torch.save` was given: dicts, lists, plain values, `Lies` for tensors.

    What a call of the pickle would make is left as `Made`; nothing is called.

    Args:
        folder: where the file is.
        name: of the file in it.
        start: its first byte, where it lies in a larger one.
        length: its bytes, where it lies in a larger one.

    Raises:
        StorageError: it is no such file, is cut short, or claims what cannot be.
    """
    with window(folder, name, start, length) as (stream, size):
        try:
            head = stream.peek(4)[:4]
            if head == _ZIP:
                value, storages = _zipped(stream, start)
            elif head[:1] == b"\x80":
                value, storages = _legacy(stream, start, size)
            else:
                raise StorageError(_no_magic(head, size))
            return _resolved(value, _Opened(folder, name, storages), 0)
        except StorageError as error:
            raise StorageError(f"{name} is no usable torch file: {error}") from None


def _no_magic(head: bytes, size: int) -> str:
    if not size:
        return "it is empty"
    return f"it begins with {head!r}, neither a zip archive nor a pickle"


# ── the archive ─────────────────────────────────────────────────────────────────────────────────


def _zipped(stream: BufferedReader, start: int) -> tuple[Any, dict[str, _Storage]]:
    members = _members(stream)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise StorageError(f"the archive holds {len(pickles)} data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and _content(stream, order, 16) != b"little":
        raise StorageError("it was written on a machine of the other byte order")
    value = unpickled(_content(stream, members[pickles[0]], PICKLE_BYTES))
    lead = f"{root}data/"
    found = {
        name.removeprefix(lead): _Storage(start + one.begin, one.length, one.crc)
        for name, one in members.items()
        if name.startswith(lead)
    }
    return value, found


def _members(stream: BufferedReader) -> dict[str, _Storage]:
    """Where each member's bytes are; all are stored as they are, none shares a byte."""
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise StorageError(f"the archive is damaged or cut short ({error})") from None
    if len(infos) > _MEMBERS:
        raise StorageError(f"the archive claims {len(infos):,} members")
    found: dict[str, _Storage] = {}
    for info in infos:
        if info.filename in found:
            raise StorageError(f"the archive holds {ascii(info.filename)[:80]} twice")
        found[info.filename] = _member(stream, info)
    _require_apart(found)
    return found


def _member(stream: BufferedReader, info: zipfile.ZipInfo) -> _Storage:
    shown = ascii(info.filename)[:80]
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise StorageError(f"{shown} is compressed or encrypted; torch.save does neither")
    if info.file_size != info.compress_size:
        raise StorageError(f"{shown} claims two sizes")
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) != 30 or not header.startswith(_ZIP):
        raise StorageError(f"{shown} is not where the archive says")
    name, extra = struct.unpack("<HH", header[26:30])
    begin = info.header_offset + 30 + name + extra
    # torch.serialization.set_crc32_options(False) leaves all of them 0
    return _Storage(begin, info.file_size, info.CRC or None)


def _require_apart(members: Mapping[str, _Storage]) -> None:
    last, end = "", 0
    for name, one in sorted(members.items(), key=lambda pair: (pair[1].begin, pair[1].length)):
        if one.begin < end and one.length:
            raise StorageError(f"{ascii(name)[:80]} and {ascii(last)[:80]} share bytes")
        last, end = (name, one.begin + one.length) if one.length else (last, end)


def _content(stream: BufferedReader, one: _Storage, limit: int) -> bytes:
    if one.length > limit:
        raise StorageError(f"a member has {one.length:,} bytes; the limit is {limit:,}")
    stream.seek(one.begin)
    data = stream.read(one.length)
    if len(data) != one.length:
        raise StorageError("it is cut short")
    if one.crc is not None and zlib.crc32(data) != one.crc:
        raise StorageError("its table of contents does not match its CRC-32: damaged")
    return data


# ── files from before torch 1.6 ─────────────────────────────────────────────────────────────────


@final
class _Careful:
    """A file of which no more is read at once than a pickle may be long."""

    def __init__(self, stream: BufferedReader) -> None:
        self._stream = stream

    def read(self, count: int) -> bytes:
        """So many bytes."""
        return self._stream.read(min(count, PICKLE_BYTES))

    def readline(self) -> bytes:
        """To the end of the line."""
        return self._stream.readline(PICKLE_BYTES)

    def tell(self) -> int:
        """Which byte comes next."""
        return self._stream.tell()


def _legacy(stream: BufferedReader, start: int, size: int) -> tuple[Any, dict[str, _Storage]]:
    text = _Careful(stream)
    if unpickled(text) != _MAGIC:
        raise StorageError(
            "it is a pickle, but none that torch.save wrote; load it where you trust it and write "
            "the tensors with torch.save or safetensors.torch.save_file"
        )
    _, machine, value, keys = (unpickled(text) for _ in range(4))
    if not (isinstance(machine, dict) and machine.get("little_endian") is True):
        raise StorageError("it was written on a machine of the other byte order")
    widths = dict(_widths(value))
    if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys):
        raise StorageError("its list of storages is none")
    found, place = {}, stream.tell()
    for key in keys:
        stream.seek(place)
        count = int.from_bytes(stream.read(8), "little")
        length = count * widths.get(key, 1)
        if place + 8 + length > size:
            raise StorageError("it is cut short")
        found[key] = _Storage(start + place + 8, length, None)
        place += 8 + length
    return value, found


def _widths(value: Any) -> Iterator[tuple[str, int]]:
    """Bytes per element of every storage that the tree names."""
    heap, seen = [value], set[int]()
    while heap:
        item = heap.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        match item:
            case Persistent(key=("storage", Global(name=kind), str(key), *_)) if kind in STORAGES:
                yield key, STORAGES[kind].itemsize
            case Made():
                heap += [item.args, item.state, item.items, item.pairs]
            case dict():
                heap += item.values()
            case list() | tuple():
                heap += item


# ── from symbols to values ──────────────────────────────────────────────────────────────────────


def _resolved(value: Any, file: _Opened, depth: int) -> Any:
    """The tree with its tensors told by where they lie, and dicts made plain."""
    if depth > _DEEP:
        raise StorageError(f"it is nested more than {_DEEP} deep")
    if next(file.seen) > _VALUES:  # a few bytes can name one list a billion times over
        raise StorageError(f"it claims more than {_VALUES:,} values")
    match value:
        case Made(maker=maker) if maker == _ORDERED and not value.args:
            return {key: _resolved(item, file, depth + 1) for key, item in value.pairs.items()}
        case Made(maker=maker, args=(tuple(size),)) if maker == _SIZE:
            return size
        case Made(maker=maker) if maker in _REBUILD:
            return _tensor(value, file)
        case Made(maker=maker, args=(Made() as data, *_)) if maker in _PARAMETER:
            return _resolved(data, file, depth + 1)
        case dict():
            return {key: _resolved(item, file, depth + 1) for key, item in value.items()}
        case list():
            return [_resolved(item, file, depth + 1) for item in value]
        case tuple():
            return tuple(_resolved(item, file, depth + 1) for item in value)
    return value


def _tensor(made: Made, file: _Opened) -> Lies:
    match made.args:
        case (
            Persistent(key=("storage", Global(name=kind), str(key), _, *_)),
            int(offset),
            tuple(shape),
            tuple(stride),
            *rest,
        ) if kind in STORAGES and key in file.storages:
            dtype = STORAGES[kind]
        case (Persistent(key=("storage", Global(name=kind), key, *_)), *_):
            raise StorageError(f"a tensor is in the storage {ascii(key)[:40]} ({kind}), not there")
        case _:
            raise StorageError("a tensor's claims are of wrong types")
    if made.maker.name.endswith("v3"):
        dtype = _dtype(rest[2:3])
    dtype_name(dtype)
    _require_counts(offset, shape, stride)
    storage = file.storages[key]
    begin = storage.begin + offset * dtype.itemsize
    where = (storage.begin, storage.length)
    lies = Lies(file.folder, file.file, begin, dtype, shape, stride, where, storage.crc)
    _require_inside(lies, offset)
    return lies


def _dtype(given: list[Any]) -> torch.dtype:
    names = {f"torch.{name}": dtype for name, dtype in TYPES.items()}
    found = names.get(str(given[0])) if given else None
    if found is None:
        raise StorageError("a tensor has a dtype that is not known")
    return found


TYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}  # fmt: skip


def _require_counts(offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> None:
    numbers = (offset, *shape, *stride)
    sound = all(type(n) is int and 0 <= n < 2**62 for n in numbers)
    if not sound or len(shape) != len(stride) or len(shape) > _DIMS:
        raise StorageError(
            f"a tensor claims shape {ascii(shape)[:60]}, stride {ascii(stride)[:60]}"
        )


def _require_inside(lies: Lies, offset: int) -> None:
    item, length = lies.dtype.itemsize, lies.storage[1]
    if (offset + lies.elements) * item > length:
        raise StorageError(
            f"a tensor of shape {list(lies.shape)} goes past the {length:,} bytes of its storage"
        )
    if math.prod(lies.shape) * item > length:
        raise StorageError(
            f"a tensor of shape {list(lies.shape)} repeats the {length:,} bytes of its storage; "
            "save it with .contiguous()"
        )


# ── what is in a tree ───────────────────────────────────────────────────────────────────────────


def leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in a tree that holds nothing else, with its path."""
    heap: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while heap:
        path, item = heap.pop()
        if isinstance(item, dict) and item:
            heap += [((*path, shown(key)), inner) for key, inner in reversed(item.items())]
        elif isinstance(item, list | tuple) and any(isinstance(i, Lies | dict) for i in item):
            heap += [((*path, str(i)), item[i]) for i in reversed(range(len(item)))]
        else:
            yield path, item


def listed(tree: Any) -> tuple[dict[str, Lies], dict[str, str]]:
    """The tensors of a tree by dotted name; and what else would have to be called, by name.

    Raises:
        StorageError: two have one name.
    """
    tensors: dict[str, Lies] = {}
    calls: dict[str, str] = {}
    for path, item in leaves(tree):
        name = ".".join(path)
        if isinstance(item, Lies):
            if name in tensors:
                raise StorageError(f"two tensors are named {ascii(name)[:100]}")
            tensors[name] = item
        elif (maker := _maker(item)) is not None:
            calls[name] = str(maker)
    return tensors, calls


def _maker(item: Any) -> Global | None:
    if isinstance(item, Made):
        return item.maker
    if isinstance(item, list | tuple):
        return next((found for i in item if (found := _maker(i)) is not None), None)
    return None


def shown(key: Any) -> str:
    """A key of a dict, as part of a name."""
    return key if isinstance(key, str) else ascii(key)
