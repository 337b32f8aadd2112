"""Results of the full matrix, kept by tree so that a run cut short, or in parts, goes on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from meshwright.run.equality.measure import Report
from tests.equal.tables import TABLES, Table, with_micros
from tests.laws.source import ROOT

CACHE = ROOT / ".matrix"
PAGE = ROOT / "docs" / "matrix.md"
REFUSED = "refused"
_READ = ("src", "examples", "tests/equal")
"""What results depend on, of this repository."""

HEAD = """# Equality matrix

`make matrix` writes this page. Each plan runs some steps, a different batch each step, beside the
user's own eager code on one device, in float64, dropout on; a cell is the largest relative error of
the loss, any gradient, weight or optimizer state (the law: 1e-10). *refused*: the plan would split
the samples of a batch norm otherwise than the job says, and a check says so. Plans in bf16 run the
same ops in float64 for this figure, and are compared with eager autocast as well (decisions/0010).
"""


def tree() -> str:
    """A name for all that results depend on, what is not committed included."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout

    kept = git("rev-parse", *(f"HEAD:{path}" for path in _READ))
    changed = git("diff", "HEAD", "--", *_READ)
    return hashlib.sha256((kept + changed).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Record:
    """One file a cell, so that processes that run parts of the matrix don't meet.

    Attributes:
        tree: which source the results are of.
        folder: of all trees' results.
        seen: what this process found or read.
    """

    tree: str
    folder: Path = CACHE
    seen: dict[str, float | str] = field(default_factory=dict)

    def once(
        self, table: Table, cell: tuple[str, str, int], run: Callable[[], Report | str]
    ) -> None:
        """Run a cell unless its result is kept; keep the worst error, or what a check said."""
        path = self._path(table, cell)
        if path.exists():
            return
        found = run()
        worst = found if isinstance(found, str) else max(w.error for w in found.worst.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({"cell": [table.title, *cell], "worst": worst}))
        aside.rename(path)

    def worst(self, table: Table, cell: tuple[str, str, int]) -> float | str | None:
        """The kept result of a cell."""
        path = self._path(table, cell)
        if not path.exists():
            return None
        found: float | str = json.loads(path.read_text())["worst"]
        return found

    def _path(self, table: Table, cell: tuple[str, str, int]) -> Path:
        row, plan, microbatches = cell
        name = f"{table.title} {row} {with_micros(plan, microbatches)}"
        return self.folder / self.tree / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"

    def page(self, tables: tuple[Table, ...] = TABLES) -> str:
        """docs/matrix.md."""
        lines = [HEAD]
        done = [self.worst(table, cell) is not None for table in tables for cell in table.cells]
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        lines += [f"Tree `{self.tree}`, {today}: {sum(done)} of {len(done)} cells."]
        for table in tables:
            for micro in table.microbatches:
                lines += ["", f"## {table.title}, microbatches={micro}", ""]
                lines += self._rows(table, micro)
        return "\n".join([*lines, ""])

    def _rows(self, table: Table, micro: int) -> list[str]:
        rows = [["", *table.plans], ["---"] * (len(table.plans) + 1)]
        for row in table.rows:
            found = [self.worst(table, (row, plan, micro)) for plan in table.plans]
            rows.append([row, *map(_text, found)])
        return [f"| {' | '.join(row)} |" for row in rows]


def _text(worst: float | str | None) -> str:
    if worst is None:
        return ""
    return worst if isinstance(worst, str) else f"{worst:.0e}"
