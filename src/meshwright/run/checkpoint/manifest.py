"""A checkpoint's table of contents: a pure, strictly validated value.

    {"version": 2, "step": 20, "meta": {...}, "sha256": digest of all the rest,
     "entries": {"model/head": {"dtype": "float32", "shape": [4, 8], "pieces": [
         {"file": "rank0.safetensors", "start": [0, 0], "shape": [2, 8], "digests": [one per MiB]},
         ...]}},
     "files": {"rank0.safetensors": {"bytes": 1232, "header": digest, "digest": "xxh3-128"}, ...}}

Beside it lies its commit record, which holds the digest of its bytes: no checkpoint without.

A manifest may come from a stranger. `parse` answers a manifest all of whose claims are possible,
or raises StorageError: nothing is opened or allocated by what it says before that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.errors import StorageError
from meshwright.run.checkpoint.digest import CHUNK, KINDS
from meshwright.run.checkpoint.meta import check_meta
from meshwright.run.checkpoint.region import Region, intersect, overlap, whole

__all__ = [
    "ITEM_BYTES",
    "MANIFEST_BYTES",
    "Entry",
    "File",
    "Manifest",
    "Stored",
    "parse",
    "pieces_in",
    "record_of",
    "render",
    "seal",
]

VERSION = 2

# The dtypes a safetensors file can hold, and bytes per element.
ITEM_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}

# Limits on what a manifest may claim, checked before anything is allocated.
MANIFEST_BYTES = 128 << 20
_ENTRIES = 1_000_000
_DIMS = 16
_TEXT = 4096
_LARGEST = 2**63 - 1

_FILE = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,2}", re.ASCII)
_HEXADECIMAL = re.compile(r"[0-9a-f]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stored:
    """One box of an entry, the file that holds it, and the digests of its chunks."""

    file: str
    region: Region
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the checkpoint: its global shape, and the pieces that tile it.

    An entry without elements has no pieces.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class File:
    """A shard's length in bytes, the digest of its header (all that is no piece), and which."""

    bytes: int
    header: str
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint; `meta` is the JSON object that was given to `save`."""

    step: int
    meta: Mapping[str, Any]
    entries: Mapping[str, Entry]
    files: Mapping[str, File]


def pieces_in(entry: Entry, region: Region) -> Iterator[tuple[Stored, Region]]:
    """The pieces that answer a read of `region`, each with the box it contributes."""
    for piece in entry.pieces:
        shared = intersect(piece.region, region)
        if shared is not None:
            yield piece, shared


def render(manifest: Manifest) -> bytes:
    """The manifest as the bytes of `manifest.json`; `parse` answers an equal value."""
    return seal(
        {
            "version": VERSION,
            "step": manifest.step,
            "meta": dict(manifest.meta),
            "entries": {name: _entry_tree(entry) for name, entry in manifest.entries.items()},
            "files": {
                name: {"bytes": file.bytes, "header": file.header, "digest": file.digest}
                for name, file in manifest.files.items()
            },
        }
    )


def seal(tree: Mapping[str, Any]) -> bytes:
    """A JSON object with its own digest added under `sha256`."""
    return json.dumps({**tree, "sha256": _digest(tree)}).encode()


def record_of(data: bytes) -> bytes:
    """The commit record of a manifest of these bytes: with it, and only then, it counts."""
    digest = hashlib.sha256(data).hexdigest()
    return json.dumps({"version": VERSION, "manifest": digest}).encode() + b"\n"


def parse(data: bytes) -> Manifest:
    """The manifest in `data`, all of whose claims are possible.

    Raises:
        StorageError: any other bytes, whatever they are; the message names the part at fault.
    """
    if len(data) > MANIFEST_BYTES:
        raise StorageError(f"it has {len(data):,} bytes; the limit is {MANIFEST_BYTES:,}")
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_unique)
        _check_version(tree)
        _check_digest(tree)
    except RecursionError:
        raise StorageError("it is nested too deeply") from None
    except ValueError as error:
        raise StorageError(f"it is no JSON: {str(error)[:200]}") from None
    _keys(tree, "the manifest", "version", "step", "meta", "entries", "files", "sha256")
    check_meta(tree["meta"])
    files = {_file_name(n): _file(n, v) for n, v in _object(tree["files"], "files").items()}
    entries = _object(tree["entries"], "entries")
    if len(entries) > _ENTRIES:
        raise StorageError(f"it lists {len(entries):,} entries; the limit is {_ENTRIES:,}")
    manifest = Manifest(
        step=_count(tree["step"], "step"),
        meta=tree["meta"],
        entries={_entry_name(name): _entry(name, value) for name, value in entries.items()},
        files=files,
    )
    _check_files(manifest)
    return manifest


# ── the pieces of `parse`: each answers a value, or raises StorageError naming the part ──────────


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StorageError(f"the key {_shown(twice)} stands twice")
    return tree


def _check_version(tree: Any) -> None:
    version = _object(tree, "the manifest").get("version")
    if version != VERSION or isinstance(version, bool):
        raise StorageError(
            f"it has format version {_shown(version)}, this Meshwright reads version {VERSION}; "
            "load it with the release that wrote it"
        )


def _check_digest(tree: dict[str, Any]) -> None:
    told, read = tree.get("sha256"), _digest(tree)
    if told != read:
        raise StorageError(
            f"its digest does not match: {_shown(told)} expected, {read[:12]}.. read"
        )


def _digest(tree: Mapping[str, Any]) -> str:
    body = {key: value for key, value in tree.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(name: str, value: Any) -> Entry:
    where = f"entry {_shown(name)}"
    tree = _keys(value, where, "dtype", "shape", "pieces")
    dtype, shape = tree["dtype"], _shape(tree["shape"], where)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise StorageError(f"{where} has dtype {_shown(dtype)}; known: {', '.join(ITEM_BYTES)}")
    if not isinstance(tree["pieces"], list):
        raise StorageError(f"{where}: pieces must be a list, not {_shown(tree['pieces'])}")
    pieces = tuple(_stored(piece, shape, where) for piece in tree["pieces"])
    _check_tiling(tuple(piece.region for piece in pieces), shape, where)
    return Entry(dtype, shape, pieces)


def _stored(value: Any, shape: tuple[int, ...], where: str) -> Stored:
    tree = _keys(value, f"a piece of {where}", "file", "start", "shape", "digests")
    region = Region(_shape(tree["start"], where), _shape(tree["shape"], where))
    if not region.inside(shape):
        raise StorageError(
            f"{where}, shape {list(shape)}: the piece at {list(region.start)} of shape "
            f"{list(region.shape)} lies outside"
        )
    if not isinstance(tree["digests"], list):
        raise StorageError(f"{where}: digests must be a list, not {_shown(tree['digests'])}")
    return Stored(_file_name(tree["file"]), region, tuple(tree["digests"]))


def _check_tiling(regions: tuple[Region, ...], shape: tuple[int, ...], where: str) -> None:
    """Every element in exactly one piece."""
    if any(region.volume == 0 for region in regions):
        raise StorageError(f"{where} has a piece without elements")
    try:
        pair = overlap(regions)
    except ValueError as error:
        raise StorageError(f"{where}: {error}") from None
    if pair is not None:
        one, two = ([list(r.start), list(r.shape)] for r in pair)
        raise StorageError(f"{where}: the pieces {one} and {two} (start, shape) overlap")
    held, size = sum(region.volume for region in regions), whole(shape).volume
    if held != size:
        raise StorageError(f"{where}, shape {list(shape)}: its pieces hold {held:,} of {size:,}")


def _check_files(manifest: Manifest) -> None:
    """Every file named is listed, listed ones are used, and long enough for their pieces."""
    needed: dict[str, int] = defaultdict(int)
    for name, entry in manifest.entries.items():
        for piece in entry.pieces:
            if piece.file not in manifest.files:
                raise StorageError(
                    f"entry {_shown(name)} is in {piece.file}, which is not among the files"
                )
            size = piece.region.volume * ITEM_BYTES[entry.dtype]
            needed[piece.file] += size
            _check_digests(piece, size, manifest.files[piece.file], f"entry {_shown(name)}")
    for file, claim in manifest.files.items():
        if claim.bytes < needed[file]:
            raise StorageError(
                f"{file} is listed with {claim.bytes:,} bytes, but its pieces need {needed[file]:,}"
            )


def _check_digests(piece: Stored, size: int, file: File, where: str) -> None:
    """One for each chunk."""
    chunks = -(-size // CHUNK)
    if len(piece.digests) != chunks:
        raise StorageError(
            f"{where}: a piece of {size:,} bytes has {len(piece.digests)} digests, not {chunks}"
        )
    for told in piece.digests:
        _hexadecimal(told, KINDS[file.digest], where)


def _file(name: str, value: Any) -> File:
    where = f"file {_shown(name)}"
    tree = _keys(value, where, "bytes", "header", "digest")
    kind = tree["digest"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise StorageError(f"{where} has digests {_shown(kind)}; known: {', '.join(KINDS)}")
    header = _hexadecimal(tree["header"], KINDS[kind], where)
    return File(_count(tree["bytes"], where), header, kind)


def _entry_tree(entry: Entry) -> dict[str, Any]:
    return {
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "pieces": [
            {
                "file": piece.file,
                "start": list(piece.region.start),
                "shape": list(piece.region.shape),
                "digests": list(piece.digests),
            }
            for piece in entry.pieces
        ],
    }


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StorageError(f"{where} must be a JSON object, not {_shown(value)}")
    return value


def _keys(value: Any, where: str, *keys: str) -> dict[str, Any]:
    tree = _object(value, where)
    if wrong := sorted(tree.keys() ^ set(keys)):
        verb = "has no" if wrong[0] in keys else "has the unknown key"
        raise StorageError(f"{where} {verb} {_shown(wrong[0])}")
    return tree


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise StorageError(f"{where}: {_shown(value)} must be a whole number from 0 to 2^63 - 1")
    return value


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _DIMS:
        found = f"a list of {len(value)}" if isinstance(value, list) else _shown(value)
        raise StorageError(f"{where}: {found} must be a list of at most {_DIMS} numbers")
    shape = tuple(_count(n, where) for n in value)
    if math.prod(shape) * 8 > _LARGEST:
        raise StorageError(f"{where}: {list(shape)} is larger than any file")
    return shape


def _hexadecimal(value: Any, digits: int, where: str) -> str:
    if not isinstance(value, str) or len(value) != digits or not _HEXADECIMAL.fullmatch(value):
        raise StorageError(f"{where}: {_shown(value)} must be {digits} hexadecimal digits")
    return value


def _file_name(value: Any) -> str:
    """One path component from a short alphabet: no separator, no `..`, no hidden file."""
    if not isinstance(value, str) or not _FILE.fullmatch(value):
        raise StorageError(f"{_shown(value)} is no plain file name inside the checkpoint")
    return value


def _entry_name(value: str) -> str:
    if not 0 < len(value) <= _TEXT or not value.isprintable():
        raise StorageError(
            f"the entry name {_shown(value)} must be 1 to {_TEXT} printable characters"
        )
    return value


def _shown(value: Any) -> str:
    """A hostile value, fit for a terminal: escaped, and short."""
    kept = value if isinstance(value, str | int | float | type(None)) else type(value).__name__
    text = ascii(kept) if not isinstance(kept, int) or abs(kept) < 2**80 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."
