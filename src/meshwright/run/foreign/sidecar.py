"""`meshwright.json` beside what is exported: what other formats have no room for, and digests.

    {"version": 1, "step": 20, "meta": {...}, "whole": whether no tensor was left out,
     "buffers": [...], "sha256": digest of all the rest,
     "files": {"model.safetensors": {"bytes": 1232, "sha256": ...}}}

With it a round trip gives back all that a checkpoint said. It may come from a stranger, as a
manifest may; without it a reader knows only what the format tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.claims import check_claims
from meshwright.run.checkpoint.durable import opened, read_small, write_file
from meshwright.run.checkpoint.manifest import MANIFEST_BYTES, seal
from meshwright.run.checkpoint.meta import check_meta
from meshwright.run.checkpoint.region import Region
from meshwright.run.foreign.source import Source, bare, kind, shown

__all__ = ["SIDECAR", "read_sidecar", "with_sidecar", "write_sidecar"]

SIDECAR: Final = "meshwright.json"
_CHUNK: Final = 8 << 20
_KEYS: Final = {"version", "step", "meta", "whole", "buffers", "files", "sha256"}
_PART: Final = re.compile(r"[^/\x00]{1,255}", re.DOTALL)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What is told beside the format's own files."""

    step: int | None
    meta: Mapping[str, Any] | None
    whole: bool
    buffers: tuple[str, ...]
    files: Mapping[str, tuple[int, str]]


def write_sidecar(source: Source, folder: Path, *, whole: bool) -> None:
    """Write it for all files that are in `folder`, which are read once more.

    Args:
        source: what was written.
        folder: to where.
        whole: whether all of it was.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    told = {file.relative_to(folder).as_posix(): _digest(file.parent, file.name) for file in files}
    tree = {
        "version": 1,
        "step": source.step,
        "meta": None if source.meta is None else dict(source.meta),
        "whole": whole,
        "buffers": [bare(name) for name in source.of("buffer")],
        "files": {name: {"bytes": size, "sha256": sha} for name, (size, sha) in told.items()},
    }
    write_file(folder / SIDECAR, [seal(tree)])


def _digest(folder: Path, name: str) -> tuple[int, str]:
    digest = hashlib.sha256()
    with opened(folder, name) as file, os.fdopen(os.dup(file), "rb") as stream:
        size = os.fstat(file).st_size
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return size, digest.hexdigest()


def read_sidecar(folder: Path) -> Sidecar | None:
    """What stands beside the files in `folder`; None where there is nothing.

    Raises:
        StorageError: it is damaged, or cannot be true.
    """
    if not (folder / SIDECAR).exists():
        return None
    data = read_small(folder, SIDECAR, MANIFEST_BYTES)
    try:
        tree = json.loads(data.decode())
        if not isinstance(tree, dict) or tree.keys() != _KEYS or tree["version"] != 1:
            raise StorageError(f"it must hold {', '.join(sorted(_KEYS))}, of version 1")
        body = {key: value for key, value in tree.items() if key != "sha256"}
        if json.loads(seal(body))["sha256"] != tree["sha256"]:
            raise StorageError("its digest does not match")
        return _sidecar(tree)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{folder / SIDECAR} is damaged: {str(error)[:200]}") from None
    except StorageError as error:
        raise StorageError(f"{folder / SIDECAR} cannot be used: {error}") from None


def _sidecar(tree: Mapping[str, Any]) -> Sidecar:
    step, meta, buffers, whole = (tree[key] for key in ("step", "meta", "buffers", "whole"))
    if meta is not None:
        check_meta(meta)
        check_claims(meta)
    if not (step is None or (type(step) is int and 0 <= step < 2**62)):
        raise StorageError(f"the step is {shown(str(step))}")
    if not isinstance(buffers, list) or not all(isinstance(name, str) for name in buffers):
        raise StorageError("buffers must be a list of names")
    files = {}
    for name, claim in tree["files"].items():
        size, sha = claim["bytes"], claim["sha256"]
        if any(not _PART.fullmatch(part) or part in (".", "..") for part in name.split("/")):
            raise StorageError(f"{shown(name)!r} is no file inside the folder")
        if type(size) is not int or not isinstance(sha, str) or not _SHA256.fullmatch(sha):
            raise StorageError(f"the claim of {shown(name)} is none")
        files[name] = (size, sha)
    if not isinstance(whole, bool):
        raise StorageError("whole must be true or false")
    return Sidecar(step, meta, whole, tuple(buffers), files)


def with_sidecar(source: Source) -> Source:
    """The source with what stands beside it: buffers by their kind, tied names left to `tied`."""
    folder = source.path if source.path.is_dir() else source.path.parent
    told = read_sidecar(folder)
    if told is None or (source.path.is_file() and source.path.name not in told.files):
        return source
    for name in told.files:
        inner = folder / name
        with opened(inner.parent, inner.name) as file:
            found = os.fstat(file).st_size
        if found != told.files[name][0]:
            raise StorageError(
                f"{inner} has {found:,} bytes, {SIDECAR} says {told.files[name][0]:,}"
            )
    meta = told.meta
    if meta is not None and not told.whole:  # no run can go on from a part
        meta = {**meta, "imported": source.format}
    tied = (meta or {}).get("tied", {})
    buffers = set(told.buffers)
    old: dict[str, str] = {}
    for name in source.items:
        own = bare(name)
        if kind(name) == "model" and own in tied and f"model/{tied[own]}" in source.items:
            continue
        old[f"buffer/{own}" if kind(name) == "model" and own in buffers else name] = name

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        return source.boxes(old[name])

    items = {name: source.items[own] for name, own in old.items()}
    return replace(
        source,
        items=items,
        boxes=boxes,
        check=lambda: _checked(folder, told),
        step=told.step if source.step is None else source.step,
        meta=meta,
        notes=() if meta is not None else source.notes,
    )


def _checked(folder: Path, told: Sidecar) -> str:
    for name, (_, sha) in told.files.items():
        inner = folder / name
        _, found = _digest(inner.parent, inner.name)
        if found != sha:
            raise StorageError(
                f"{inner} is damaged: expected sha256 {sha[:12]}.., read {found[:12]}..; if it was "
                f"changed on purpose, remove {folder / SIDECAR}"
            )
    return "sha256"
