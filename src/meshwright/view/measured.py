"""A run's memory as its bill foretold it, beside what was measured, by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.view.fields import integer, mapping, mappings

__all__ = ["Compared", "compared", "difference_text"]

_STEPS = "activations, working memory, batches, slack"
_SAVED = "saved activations"
_MADE = ("gradients", _SAVED, "working memory")


@dataclass(frozen=True, slots=True)
class Compared:
    """A rank: (part, bytes foretold, bytes measured), and what they come to.

    Attributes:
        rank: its number.
        rows: parts that are not in each other.
        saved: saved activations, foretold and measured, which are in the rows.
        bill: the most that was foretold.
        peak: the most that was resident.
    """

    rank: int
    rows: tuple[tuple[str, int, int], ...]
    saved: tuple[int, int]
    bill: int
    peak: int

    @property
    def difference(self) -> float:
        """Measured over foretold, less one."""
        return self.peak / self.bill - 1 if self.bill else 0.0


def compared(run: Mapping[str, Any]) -> tuple[Compared, ...]:
    """The ranks of a decoded `run.json`, the neediest first; none where nothing was measured."""
    bills = {integer(entry.get("rank")): entry for entry in mappings(run.get("memory"))}
    found = [
        _compared(bills[rank], entry)
        for entry in mappings(run.get("measured"))
        if (rank := integer(entry.get("rank"))) in bills and integer(entry.get("peak"))
    ]
    return tuple(sorted(found, key=lambda one: -one.peak))


def _compared(bill: Mapping[str, Any], measured: Mapping[str, Any]) -> Compared:
    parts, there = mapping(bill.get("parts")), mapping(measured.get("parts"))
    beside = mapping(bill.get("beside"))
    process = integer(measured.get("process"))
    host = integer(mapping(bill.get("away")).get("host"))
    copies = integer(there.get("copies for checkpoints"))
    foretold = {name: integer(size) for name, size in parts.items() if name not in _MADE[1:]}
    foretold["communication buffers"] = integer(beside.get("communication buffers"))
    foretold |= {"copies for checkpoints": integer(bill.get("saving")) if copies else 0}
    foretold |= {"host memory": host, "process": process}
    peak = integer(bill.get("peak")) + process + foretold["copies for checkpoints"]
    found = {name: integer(size) for name, size in there.items() if name != _SAVED}
    found |= {"host memory": integer(mapping(measured.get("away")).get("host"))}
    found["process"] = process
    most = integer(measured.get("peak"))
    rest = peak - sum(foretold.values()), most - sum(found.values())
    names = dict.fromkeys((*foretold, *found))
    rows = [(name, foretold.get(name, 0), found.get(name, 0)) for name in names]
    rows = [row for row in rows if row[1] or row[2]]
    rows.insert(-1, (_STEPS, *rest))
    saved = integer(parts.get(_SAVED)), integer(there.get(_SAVED))
    return Compared(integer(measured.get("rank")), tuple(rows), saved, peak, most)


def difference_text(one: Compared) -> str:
    """`2.1 % over its bill`."""
    share = abs(one.difference)
    return f"{share * 100:.1f} % {'over' if one.difference > 0 else 'under'} its bill"
