"""Reading checkpoints: opened strictly, checked before use, sliced for any layout.

`resume` is how a run finds where to go on: the newest checkpoint that all ranks, each reading its
share of the files, found whole.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.errors import StorageError, nearest
from meshwright.run.checkpoint.claims import check_claims
from meshwright.run.checkpoint.durable import read_small
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.checkpoint.manifest import (
    MANIFEST_BYTES,
    Entry,
    Manifest,
    parse,
    pieces_in,
    record_of,
)
from meshwright.run.checkpoint.region import Region
from meshwright.run.checkpoint.retention import Saved, listed, step_of
from meshwright.run.checkpoint.shards import Shards
from meshwright.run.together import together, try_together

__all__ = [
    "COMMIT",
    "MANIFEST",
    "Checkpoint",
    "Found",
    "is_committed",
    "newest",
    "open_checkpoint",
    "resume",
]

MANIFEST = "manifest.json"
COMMIT = "commit.json"
_RECORD_BYTES = 4096


@final
@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An open checkpoint; a context manager that closes its files.

    What is read was compared with its digests, chunk by chunk, on its way.
    """

    path: Path
    manifest: Manifest
    _shards: Shards

    @property
    def step(self) -> int:
        """How many steps had been done when it was saved."""
        return self.manifest.step

    @property
    def meta(self) -> Mapping[str, Any]:
        """The JSON object given to `save`."""
        return self.manifest.meta

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor by its global name."""
        return self.manifest.entries

    def read(
        self, name: str, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The box [start, start + shape) of an entry, or all of it, from pieces of any layout.

        Raises:
            StorageError: no such entry or box, or a piece of it is damaged.
        """
        entry = self._entry(name)
        begin = (0,) * len(entry.shape) if start is None else tuple(start)
        size = entry.shape if shape is None else tuple(shape)
        _check_inside(name, entry, Region(begin, size))
        target = torch.empty(size, dtype=dtype_of(entry.dtype))
        self.read_into(target, name, begin)
        return target

    def read_into(self, target: Tensor, name: str, start: tuple[int, ...]) -> None:
        """Fill `target` with the box of its shape that begins at `start`, without a second copy.

        Raises:
            StorageError: no such entry or box, another dtype, or a piece of it is damaged.
        """
        entry = self._entry(name)
        region = Region(tuple(start), tuple(target.shape))
        _check_inside(name, entry, region)
        if target.dtype != dtype_of(entry.dtype):
            raise StorageError(f"entry {name!r} is {entry.dtype}, asked for as {target.dtype}")
        with _usable(self.path), torch.no_grad():
            for piece, shared in pieces_in(entry, region):
                part = target[shared.slices(region.start)]
                self._shards.copy(name, entry, piece, shared, part)

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare all files with their digests, or every `shares`-th of them from `share` on.

        Raises:
            StorageError: the first that differs; names file, entry, expected and read digest.
        """
        mine = set(sorted(self.manifest.files)[share::shares])
        with _usable(self.path):
            self._shards.check_lengths(sorted(mine))
            for name, entry in self.entries.items():
                for piece in entry.pieces:
                    if piece.file in mine:
                        self._shards.check(name, entry, piece)

    def close(self) -> None:
        """Close its files."""
        self._shards.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise StorageError(
                f"{self.path} has no entry {name!r}; {nearest(name, list(self.entries))}"
            )
        return self.entries[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint: its manifest is validated, its files are there with the right lengths.

    Digests are compared when an entry is first read, or all by `verify`.

    Raises:
        StorageError: it is none, or cannot be what its manifest claims.
    """
    with _usable(path):
        _check_folder(path)
        manifest = _committed(path)
        check_claims(manifest.meta)
        named = step_of(path.name)
        if named not in (None, manifest.step):
            raise StorageError(f"its folder is of step {named}, its manifest of {manifest.step}")
        shards = Shards(path, manifest.files)
        shards.check_lengths(manifest.files)
        _check_strangers(path, manifest)
    return Checkpoint(path, manifest, shards)


def is_committed(path: Path) -> bool:
    """Whether a folder is a checkpoint whose saving came to its end; it may be damaged since."""
    try:
        record = read_small(path, COMMIT, _RECORD_BYTES)
    except StorageError:
        return False
    return record.endswith(b"\n")  # its last byte, so a write that was cut short lacks it


def _committed(path: Path) -> Manifest:
    """The manifest in `path`, compared with its commit record."""
    data = read_small(path, MANIFEST, MANIFEST_BYTES)
    try:
        manifest = parse(data)
    except StorageError as error:
        raise StorageError(f"{MANIFEST} cannot be used: {error}") from None
    record = read_small(path, COMMIT, _RECORD_BYTES)
    if record != record_of(data):
        raise StorageError(
            f"{MANIFEST} is not the one that {COMMIT} is the record of: one of the two was changed "
            "or cut short"
        )
    return manifest


def _check_strangers(path: Path, manifest: Manifest) -> None:
    """Shards of another save are a sign that files were mixed up."""
    found = {entry.name for entry in path.iterdir() if entry.name.endswith(".safetensors")}
    if strangers := sorted(found - manifest.files.keys()):
        raise StorageError(
            f"{strangers[0]!a} lies in it, and {MANIFEST} does not list it: it is of another save, "
            "or the manifest is; take it away"
        )


def _check_folder(path: Path) -> None:
    """Say in the user's words why `path` is no checkpoint."""
    if (path / MANIFEST).is_file():
        if not (path / COMMIT).exists():
            raise StorageError(f"it has no {COMMIT}: its saving was cut short, so it never counted")
        return
    if not path.exists():
        raise StorageError(f"there is no checkpoint {path}")
    if path.is_file():
        raise StorageError(
            f"{path} is a file; a checkpoint is a folder with {MANIFEST} in it "
            "(torch.save's files are pickles, which can run commands: they are never loaded)"
        )
    inside = listed(found.name for found in path.iterdir())
    hint = f"; did you mean {path / inside[0].name}?" if inside else ""
    raise StorageError(f"{path} is no checkpoint: there is no {MANIFEST} in it{hint}")


def _check_inside(name: str, entry: Entry, region: Region) -> None:
    if not region.inside(entry.shape):
        raise StorageError(
            f"entry {name!r} has shape {list(entry.shape)}; there is no box of shape "
            f"{list(region.shape)} at {list(region.start)} in it"
        )


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Say which checkpoint an error is about."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"checkpoint {path} cannot be used: {error}") from None
    except OSError as error:
        raise StorageError(f"checkpoint {path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Found:
    """Where to go on: the newest whole checkpoint, and why newer ones were passed over.

    `damaged` are those that once counted; `unfinished` those whose saving was cut short.
    """

    path: Path | None
    damaged: tuple[str, ...]
    unfinished: tuple[str, ...] = ()


Use = Callable[[Checkpoint], Any]
"""Reads of a checkpoint what a rank needs; a StorageError means that it is damaged."""


def resume(
    root: Path,
    group: Group,
    rank_index: int,
    at: int | None = None,
    use: Use | None = None,
    fits: Use | None = None,
) -> Generator[Any, Any, Found]:
    """The newest checkpoint in `root` that verifies on all ranks, or that of step `at`.

    Every rank reads its share of each candidate's files, or what `use` reads; of one that turns out
    damaged in between it may have read some. None is found where none was saved.

    Args:
        root: of all checkpoints.
        group: of all ranks.
        rank_index: this rank's in it.
        at: the step that is asked for.
        use: what to read instead.
        fits: refuses a whole checkpoint that is of another job; what it raises is raised.

    Raises:
        StorageError: on all ranks: there are some but none is whole; or that of step `at` is
            missing or damaged (the message says which step can be resumed from).
    """
    listing = yield from together(
        lambda: _candidates(root, at) if rank_index == 0 else None, group, f"reading {root}"
    )
    names, unfinished = listing[0]
    share = rank_index, len(group.ranks)
    damaged: list[str] = []
    path = None
    for name in names:
        reading = _Reading(root / name, use or (lambda found: found.verify(*share)), fits)
        problem = yield from reading.problem(group)
        if problem is None:
            path = root / name
            break
        damaged.append(problem)
    if damaged and (path is None or at is not None):
        raise StorageError("\n".join([*damaged, _remedy(path)]))
    return Found(path, tuple(damaged), tuple(unfinished))


@dataclass(frozen=True, slots=True)
class _Reading:
    """A candidate, and what is asked of it."""

    path: Path
    use: Use
    fits: Use | None

    def problem(self, group: Group) -> Generator[Any, Any, str | None]:
        """Why it cannot be used, on all ranks alike; None where all could."""
        label = f"verifying {self.path}"
        if self.fits is not None:
            _, errors = yield from try_together(self._opened, group, label)
            if errors:
                return errors[0]
            with open_checkpoint(self.path) as checkpoint:
                self.fits(checkpoint)
        _, errors = yield from try_together(self._used, group, label)
        return errors[0] if errors else None

    def _opened(self) -> None:
        open_checkpoint(self.path).close()

    def _used(self) -> None:
        with open_checkpoint(self.path) as checkpoint:
            self.use(checkpoint)


def newest(root: Path) -> Path | None:
    """The newest checkpoint in `root` that verifies, found by this process alone.

    Raises:
        StorageError: there are some, but none is whole.
    """
    (found,) = run_local([resume(root, Group.world(1), 0)])
    path: Path | None = found.path
    return path


def _candidates(root: Path, at: int | None) -> tuple[list[str], list[str]]:
    """Names to try, newest first, from step `at` down where it is given; what was cut short."""
    found = listed(path.name for path in root.iterdir()) if root.is_dir() else []
    saved = [one for one in found if is_committed(root / one.name)]
    cut = [
        f"checkpoint {root / one.name} is passed over: its saving was cut short, there is no whole "
        f"{COMMIT} in it"
        for one in found
        if one not in saved and (at is None or one.step == at)
    ]
    if at is None:
        return [one.name for one in saved], cut
    past = [one for one in saved if one.step <= at]
    if not past or past[0].step != at:
        told = "".join(f"\n{line}" for line in cut)
        raise StorageError(f"{root} has no checkpoint of step {at}; {_steps(saved)}{told}")
    return [one.name for one in past], cut


def _steps(saved: list[Saved]) -> str:
    steps = sorted({one.step for one in saved})
    return f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none at all"


def _remedy(path: Path | None) -> str:
    if path is None:
        return "no older checkpoint is whole either; --fresh starts over"
    step = step_of(path.name)
    return f"the checkpoint of step {step} is whole: ask for that one"
