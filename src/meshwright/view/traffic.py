"""What a rank moves in a step: collectives of equal origin added up, by phase, most first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.program.fold import folded_name
from meshwright.view.runfile import Collective

__all__ = ["Phase", "Row", "phases"]

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


def _rows(collectives: Sequence[Collective]) -> tuple[Row, ...]:
    groups: dict[tuple[str, ...], list[Collective]] = {}
    for entry in collectives:
        pattern = ".".join("*" if w.isdecimal() else w for w in entry.module.split("."))
        key = (entry.op, entry.axis, entry.source, entry.why, pattern)
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
        why=first.why,
        bytes=sum(entry.bytes for entry in group),
        count=sum(entry.count for entry in group),
    )
