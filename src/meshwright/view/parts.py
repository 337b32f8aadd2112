"""The parts of a trace as `run.profiler` writes them, read back onto rank 0's clock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from meshwright.errors import StorageError

__all__ = ["Part", "Slice", "Transfer", "last_to_start", "read_parts", "transfers"]


@dataclass(frozen=True, slots=True)
class Slice:
    """One instruction of one step: what it was, and when on rank 0's clock, in seconds."""

    step: int
    place: int
    what: Mapping[str, Any]
    began: float
    ended: float

    @property
    def kind(self) -> str:
        """Of the instruction."""
        return str(self.what["kind"])

    @property
    def computes(self) -> bool:
        """Whether the model runs in it."""
        return "phase" in self.what


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank wrote: itself, and the slices of the steps that it finished, in order.

    Attributes:
        error: seconds by which its times may be off against rank 0's.
    """

    rank: int
    coordinates: Mapping[str, int]
    host: str
    pid: int
    ahead: float = 0.0
    error: float = 0.0
    slices: Sequence[Slice] = field(default_factory=tuple)

    @property
    def steps(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(dict.fromkeys(piece.step for piece in self.slices))


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective or message on one rank: its begin and its Wait; either may not be traced."""

    what: Mapping[str, Any]
    begun: Slice | None
    awaited: Slice | None


def transfers(part: Part) -> list[Transfer]:
    """Begins matched with their Waits by the name of what is pending, in order of the begins."""
    found: list[Transfer] = []
    open_: dict[str, int] = {}
    for piece in part.slices:
        if piece.kind in ("Start", "Send", "Recv"):
            open_[piece.what["pending"]] = len(found)
            found.append(Transfer(piece.what, piece, None))
        elif piece.kind == "Wait":
            at = open_.pop(piece.what["pending"], None)
            if at is None:  # a prefetch of the step before the first one
                found.append(Transfer(piece.what, None, piece))
            else:
                found[at] = Transfer(piece.what, found[at].begun, piece)
    return found


def last_to_start(parts: Sequence[Part]) -> dict[tuple[int, int, int], tuple[int, float]]:
    """Which member came last to each collective, and how many seconds after the first.

    By (rank, step, place of the Start). A collective is the same on all its members if it is the
    n-th over their group in that step; one that a member's part lacks is left out.
    """
    met: dict[tuple[Any, ...], list[tuple[int, Slice]]] = {}
    for part in parts:
        counts: dict[tuple[Any, ...], int] = {}
        for piece in part.slices:
            if piece.kind == "Start":
                group = (piece.step, piece.what["axis"], tuple(piece.what["ranks"]))
                counts[group] = counts.get(group, 0) + 1
                met.setdefault((*group, counts[group]), []).append((part.rank, piece))
    found: dict[tuple[int, int, int], tuple[int, float]] = {}
    for key, members in met.items():
        if len(members) == len(key[2]):
            last, piece = max(members, key=lambda member: member[1].began)
            late = piece.began - min(other.began for _, other in members)
            found |= {(rank, one.step, one.place): (last, late) for rank, one in members}
    return found


def read_parts(folder: Path) -> list[Part]:
    """The parts in a run's folder, by rank; none where nothing was traced.

    Raises:
        StorageError: a part cannot be read.
    """
    found: list[Part] = []
    for path in sorted((folder / "trace").glob("rank*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{path} cannot be read: {error}") from error
        try:
            found += _part(lines)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StorageError(
                f"{path} is no part of a trace ({error!r}); delete it, or trace again"
            ) from error
    return sorted(found, key=lambda part: part.rank)


def _part(lines: Sequence[str]) -> Iterator[Part]:
    """The part; none of a rank that was killed before its first line was whole."""
    entries = list(_entries(lines))
    if not entries:
        return
    head, *rest = entries
    lists: dict[int, list[Mapping[str, Any]]] = {}
    slices: list[Slice] = []
    for entry in rest:
        if "instructions" in entry:
            lists[entry["list"]] = entry["instructions"]
        else:
            slices += _slices(entry, lists[entry["list"]], head["ahead"])
    yield Part(slices=tuple(slices), **head)


def _entries(lines: Sequence[str]) -> Iterator[Any]:
    """Each line's; a last line that was cut when its rank was killed is left out."""
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise


def _slices(
    entry: Mapping[str, Any], instructions: Sequence[Mapping[str, Any]], ahead: float
) -> Iterable[Slice]:
    spans = pairwise(float(stamp) - ahead for stamp in entry["stamps"])
    for place, (what, (began, ended)) in enumerate(zip(instructions, spans, strict=True)):
        yield Slice(int(entry["step"]), place, what, began, ended)
