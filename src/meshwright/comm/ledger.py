"""The ledger: the last collective this rank entered and left. Always on, a few words per call.

When a rank stalls or a peer is lost, the ledgers of all ranks side by side say who is behind and
what everybody waits for. A ledger is written as JSON to `<run>/ledger/rank<K>.json`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

from meshwright.comm.base import MESSAGES, Start

__all__ = ["Entry", "Ledger", "describe"]

_PAIR = 2


class Entry(NamedTuple):  # made at every collective, at a fifth of a frozen dataclass's cost
    """One collective or message: its number on this rank (from 1), what it was, bytes it brought.

    A message's bytes are its sender's; who receives brings none.
    """

    number: int
    op: str
    axis: str
    ranks: tuple[int, ...]
    label: str
    bytes: int

    def text(self) -> str:
        """As in `#12 all_reduce over data (blocks.3.attn)`."""
        return f"#{self.number} {phrase(self.op, self.axis, self.label, self.ranks)}"


@final
@dataclass(slots=True)
class Ledger:
    """Counts collectives entered and left by one rank and remembers the last of each."""

    rank: int
    entered: int = 0
    left: int = 0
    last_entered: Entry | None = None
    last_left: Entry | None = None
    began: float = field(default_factory=time.time)

    def enter(self, request: Start, moved: int | None = None) -> Entry:
        """Note that this rank starts `request`, which brings `moved` bytes."""
        self.entered += 1
        if moved is None:
            moved = sum(tensor.nbytes for tensor in request.tensors)
        group = request.group
        self.last_entered = entry = Entry(
            self.entered, request.op, group.axis, group.ranks, request.label, moved
        )
        return entry

    def leave(self, entry: Entry) -> None:
        """Note that the collective of `entry` has been waited for."""
        self.left += 1
        self.last_left = entry

    def head(self) -> dict[str, Any]:
        """A JSON-able summary: counts, and the texts of the last entered and left."""
        return {
            "rank": self.rank,
            "entered": self.entered,
            "left": self.left,
            "last_entered": self.last_entered.text() if self.last_entered else None,
            "last_left": self.last_left.text() if self.last_left else None,
            "began": self.began,
        }

    def dump(self, run_dir: Path) -> Path:
        """Write the head to `run_dir/ledger/rank<K>.json` and return that path."""
        path = run_dir / "ledger" / f"rank{self.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.head(), indent=1) + "\n")
        return path


def describe(request: Start) -> str:
    """As in `all_reduce over data (blocks.3.attn)` or `send of x 3 to rank 1`: for errors."""
    return phrase(request.op, request.group.axis, request.label, request.group.ranks)


def phrase(op: str, axis: str, label: str, ranks: tuple[int, ...]) -> str:
    """The words for a collective or a message; an empty label is left out."""
    if op in MESSAGES and len(ranks) == _PAIR:
        what = f" of {label}" if label else ""
        return f"{op}{what} " + (f"to rank {ranks[1]}" if op == "send" else f"from rank {ranks[0]}")
    return f"{op} over {axis}" + (f" ({label})" if label else "")
