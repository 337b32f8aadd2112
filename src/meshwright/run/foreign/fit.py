"""How what is there differs from what is wanted, and what of it fits. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.region import Region
from meshwright.run.foreign.source import Item, Source, bare, kind, shown

__all__ = ["Difference", "difference", "fitted"]

_SUGGESTED = 20  # looking for similar names is quadratic
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """A source beside what is wanted, by the model's own names.

    Attributes:
        missing: wanted, not there; each with the most similar name that is there and not wanted.
        unexpected: there, not wanted.
        shapes: both, of different shapes: name -> there, wanted.
        dtypes: both, of different dtypes: name -> there, wanted; loading casts.
    """

    missing: Mapping[str, str | None]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[str, tuple[str, str]]


def difference(source: Mapping[str, Item], wanted: Mapping[str, Item]) -> Difference:
    """How weights and buffers differ; whether a name is a buffer's is not asked.

    Args:
        source: items by global name.
        wanted: the same of what they are to fill.
    """
    there = {bare(name): item for name, item in source.items() if kind(name) != "optimizer"}
    want = {bare(name): item for name, item in wanted.items() if kind(name) != "optimizer"}
    lacking = [name for name in want if name not in there]
    extra = [name for name in there if name not in want]
    both = [(name, there[name], want[name]) for name in want if name in there]
    return Difference(
        {name: _close(name, extra) if i < _SUGGESTED else None for i, name in enumerate(lacking)},
        tuple(extra),
        {name: (a.shape, b.shape) for name, a, b in both if a.shape != b.shape},
        {name: (a.dtype, b.dtype) for name, a, b in both if a.dtype != b.dtype},
    )


def _close(name: str, candidates: list[str]) -> str | None:
    found = difflib.get_close_matches(name, candidates, n=1)
    return found[0] if found else None


def fitted(
    source: Source, wanted: Mapping[str, Item], *, partial: bool, tied: Mapping[str, str]
) -> tuple[Source, Difference]:
    """What of the source is wanted, buffers told apart; and how it differed.

    Args:
        source: what is there.
        wanted: items by global name.
        partial: take what fits, though some is missing or not wanted.
        tied: other names of what is wanted, that may be there as well or instead.

    Raises:
        StorageError: shapes differ; or something is missing or not wanted, without `partial`.
    """
    names = {bare(n): n for n in source.items if kind(n) != "optimizer"}
    aliases = {other: own for other, own in tied.items() if other in names}
    for other, own in aliases.items():
        if own not in names:
            names[own] = names[other]
        del names[other]
    there = {f"model/{own}": source.items[name] for own, name in names.items()}
    found = difference(there, wanted)
    if found.shapes or (not partial and (found.missing or found.unexpected)):
        raise StorageError(_refusal(source, found, partial=partial))
    old: dict[str, str] = {}
    for name in wanted:
        if kind(name) != "optimizer" and bare(name) in names:
            old[name] = names[bare(name)]
    kept = {bare(name) for name in old}
    old |= {n: n for n in source.items if kind(n) == "optimizer" and bare(n) in kept}

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        return source.boxes(old[name])

    items = {name: source.items[own] for name, own in old.items()}
    return replace(source, items=items, boxes=boxes), found


def _refusal(source: Source, found: Difference, *, partial: bool) -> str:
    lines = [
        f"  {shown(name)} has shape {list(there)}, wanted {list(want)}"
        for name, (there, want) in found.shapes.items()
    ]
    if not partial:
        lines += [
            f"  {shown(name)} is missing" + (f"; there is {shown(close)}" if close else "")
            for name, close in found.missing.items()
        ]
        lines += [f"  {shown(name)} is there, but not wanted" for name in found.unexpected]
    more = [f"  ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    remedy = (
        "--map OLD=NEW renames, OLD= leaves out"
        if found.shapes
        else "--map OLD=NEW renames, --partial takes what fits"
    )
    head = f"{source.path} does not fit ({remedy}):"
    return "\n".join([head, *lines[:_SHOWN], *more])
