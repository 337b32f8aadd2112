"""What a rank moves in a step: collectives of equal origin added up, by phase, most first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meshwright.program.fold import folded_name
from meshwright.view.accounts import Collective
from meshwright.view.layouts import change

__all__ = ["Phase", "Row", "added", "hidden_text", "phases"]

_ORDER = ("forward", "backward", "finish")


@dataclass(frozen=True, slots=True)
class Row:
    """Collectives that one source line asked for, for one reason, in all layers."""

    op: str
    axis: str
    source: str
    modules: str
    why: str
    bytes: int
    count: int
    exposed: int | None
    beside: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the step and what is moved in it."""

    name: str
    rows: tuple[Row, ...]

    @property
    def bytes(self) -> int:
        """Bytes a rank moves in the phase."""
        return sum(row.bytes for row in self.rows)

    @property
    def count(self) -> int:
        """Collectives in the phase."""
        return sum(row.count for row in self.rows)


def phases(collectives: Sequence[Collective]) -> tuple[Phase, ...]:
    """The collectives by phase, in the order of a step."""
    names = dict.fromkeys([*_ORDER, *(entry.phase for entry in collectives)])
    rows = {name: _rows([c for c in collectives if c.phase == name]) for name in names}
    return tuple(Phase(name, found) for name, found in rows.items() if found)


def hidden_text(row: Row | Collective) -> str:
    """Whether something is computed beside it: `exposed`, `overlapped`, `3 of 8 exposed`."""
    if row.exposed is None:
        return ""
    if 0 < row.exposed < row.count:
        return f"{row.exposed:,} of {row.count:,} exposed"
    return "exposed" if row.exposed else "overlapped"


def added(collectives: Iterable[Collective]) -> list[Collective]:
    """Collectives of one kind over one axis, with one change of layout, as one each."""
    found: dict[tuple[str, ...], Collective] = {}
    for entry in collectives:
        key = (entry.op, entry.axis, entry.phase, change(entry.why, entry.axis))
        found[key] = _plus(found[key], entry) if key in found else entry
    return list(found.values())


def _plus(one: Collective, other: Collective) -> Collective:
    return replace(
        one,
        bytes=one.bytes + other.bytes,
        count=one.count + other.count,
        exposed=_sum([one.exposed, other.exposed]),
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    """Their sum, if all are known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _rows(collectives: Sequence[Collective]) -> tuple[Row, ...]:
    groups: dict[tuple[str, ...], list[Collective]] = {}
    for entry in collectives:
        pattern = ".".join("*" if w.isdecimal() else w for w in entry.module.split("."))
        key = (entry.op, entry.axis, entry.source, change(entry.why, entry.axis), pattern)
        groups.setdefault(key, []).append(entry)
    return tuple(sorted(map(_row, groups.values()), key=lambda row: -row.bytes))


def _row(group: Sequence[Collective]) -> Row:
    first = group[0]
    paths = list(dict.fromkeys(tuple(entry.module.split(".")) for entry in group))
    return Row(
        op=first.op,
        axis=first.axis,
        source=first.source,
        modules=folded_name(paths) if first.module else "",
        why=change(first.why, first.axis),
        bytes=sum(entry.bytes for entry in group),
        count=sum(entry.count for entry in group),
        exposed=_sum([entry.exposed for entry in group]),
        beside=min((entry.beside for entry in group if entry.beside), default=0),
    )
