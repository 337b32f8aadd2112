"""Saving a checkpoint: every rank writes its shard aside, the first one makes it visible.

    root/.step-00000020.tmp-<nonce>/rank0.safetensors ...   every rank writes and syncs its own
    root/.step-00000020.tmp-<nonce>/manifest.json           the first rank, from all ranks' digests
    root/step-00000020                                      renamed: now it is there, whole
    root/step-00000020/commit.json                          and counts, once this says so

A crash at any point leaves the older checkpoints as they were. Nothing is ever unpickled, and
loading under another plan is reading other boxes of the same entries.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meshwright.comm.base import Group
from meshwright.errors import StorageError
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.checkpoint.manifest import Entry, File, Manifest, Stored
from meshwright.run.checkpoint.meta import check_meta
from meshwright.run.checkpoint.publishing import aside_name, clean, commit, make_aside, retire
from meshwright.run.checkpoint.region import Region
from meshwright.run.checkpoint.restore import (
    MANIFEST,
    Checkpoint,
    Found,
    newest,
    open_checkpoint,
    resume,
)
from meshwright.run.checkpoint.retention import step_name
from meshwright.run.checkpoint.shard import key_of, write_shard
from meshwright.run.together import together

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "Found",
    "Piece",
    "merge",
    "newest",
    "open_checkpoint",
    "resume",
    "save",
    "write_pieces",
]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """This rank's box of an entry: `tensor` begins at `start` of a tensor of global `shape`.

    Of replicas exactly one is `primary`, and only that is written. The primary boxes of all ranks
    tile the entry. A rank may hold several boxes of one entry.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    tensor: Tensor
    primary: bool = True


def save(
    root: Path,
    step: int,
    pieces: Sequence[Piece],
    meta: Mapping[str, Any],
    group: Group,
    rank_index: int,
    keep: int = 3,
    trusted: set[str] | None = None,
) -> Generator[Any, Any, Path]:
    """Save the checkpoint of `step` in `root`, a folder that all hosts see; answers its folder.

    The first rank's `meta` (JSON) is kept. Needs no more memory than one tensor's contiguous copy.
    Afterwards only the newest `keep` are left, two at the least; `trusted` is as of `retire`.

    Raises:
        StorageError: on every rank alike, if any could not write its part; what was saved before
            is intact, and nothing of this one is left.
    """
    label = f"saving the checkpoint of step {step}"
    first = rank_index == 0
    names = yield from together(lambda: _begin(root, step, meta) if first else None, group, label)
    aside = root / names[0]
    try:
        shards = yield from together(
            lambda: write_pieces(aside / f"rank{group.ranks[rank_index]}.safetensors", pieces),
            group,
            label,
        )
        yield from together(
            lambda: commit(aside, root, merge(step, meta, shards)) if first else None, group, label
        )
    except StorageError:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if first:
        retire(root, step, keep, set() if trusted is None else trusted)
    return root / step_name(step)


def _begin(root: Path, step: int, meta: Mapping[str, Any]) -> str:
    """Make the folder that ranks write to, after removing what crashed saves left."""
    check_meta(meta)
    clean(root)
    name = aside_name(step)
    make_aside(root, name)
    return name


def write_pieces(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write a rank's primary pieces; a JSON-able account of them for the first rank."""
    mine = [(piece, key_of(piece.name, piece.start)) for piece in pieces if piece.primary]
    tensors: dict[str, Tensor] = {}
    for piece, key in mine:
        if key in tensors:
            raise StorageError(f"two pieces of {piece.name!r} start at {list(piece.start)}")
        if piece.tensor.numel():
            tensors[key] = piece.tensor
    kinds = [dtype_name(piece.tensor.dtype) for piece, _ in mine]
    file, digests = write_shard(path, tensors) if tensors else (None, {})
    return {
        "file": None if file is None else [path.name, file.bytes, file.header, file.digest],
        "pieces": [
            [
                piece.name,
                kind,
                list(piece.shape),
                list(piece.start),
                list(piece.tensor.shape),
                digests[key] if piece.tensor.numel() else None,
            ]
            for kind, (piece, key) in zip(kinds, mine, strict=True)
        ],
    }


def merge(step: int, meta: Mapping[str, Any], accounts: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest of what all ranks wrote. Pure; whether pieces tile is for `parse` to say.

    Raises:
        StorageError: ranks tell different shapes or dtypes of one entry.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    stored: dict[str, list[Stored]] = {}
    for account in accounts:
        for name, dtype, shape, start, local, digests in account["pieces"]:
            kind = (dtype, tuple(shape))
            if kinds.setdefault(name, kind) != kind:
                raise StorageError(f"ranks disagree about {name!r}: {kinds[name]} and {kind}")
            pieces = stored.setdefault(name, [])
            if digests is not None:
                region = Region(tuple(start), tuple(local))
                pieces.append(Stored(account["file"][0], region, tuple(digests)))
    entries = {name: Entry(*kinds[name], tuple(stored[name])) for name in sorted(kinds)}
    files = [account["file"] for account in accounts if account["file"]]
    return Manifest(step, meta, entries, {name: File(*claim) for name, *claim in files})
