"""Results of the full matrix, kept by commit so that a run cut short goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.equal.cells import MICROBATCHES, MODELS, PRECISIONS, RANKS, STAGES, Cell, cells, refused
from tests.laws.source import ROOT

CACHE = ROOT / ".matrix" / "results.json"
TABLE = ROOT / "docs" / "matrix.md"


def commit() -> str:
    """The commit's id; with a digest of what differs from it, where something does."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout

    changed = git("diff", "HEAD", "--", "src", "examples", "tests/equal")
    mark = "+" + hashlib.sha256(changed.encode()).hexdigest()[:8] if changed else ""
    return git("rev-parse", "HEAD").strip()[:12] + mark


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


@dataclass
class Record:
    """Worst errors by cell at one commit; a cell that a check refused says so."""

    commit: str
    path: Path = CACHE
    found: dict[str, dict[str, float] | str] = field(default_factory=dict)

    @classmethod
    def read(cls, commit: str, path: Path = CACHE) -> Record:
        """What was found at this commit, if anything."""
        if not path.exists():
            return cls(commit, path)
        kept = json.loads(path.read_text())
        return cls(commit, path, kept["cells"] if kept["commit"] == commit else {})

    def put(self, cell: Cell, errors: dict[str, float] | str) -> None:
        """Keep one cell's result."""
        self.found[str(cell)] = errors
        self.path.parent.mkdir(exist_ok=True)
        text = json.dumps({"commit": self.commit, "cells": self.found}, indent=1)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(text)
        aside.rename(self.path)

    def table(self) -> str:
        """docs/matrix.md: per model and plan the largest relative error."""
        done = sum(str(cell) in self.found for cell in cells())
        lines = [
            "# Equality matrix",
            "",
            "`make matrix` writes this page. Each plan runs five steps, a different batch each",
            "step, beside the user's own eager code on one device, in float64; a cell is the",
            "largest relative error of the loss, any gradient, weight or optimizer state (the law:",
            "1e-10). *refused*: the plan would split the samples of a batch norm otherwise than",
            "the job says, and a check says so. Plans in bf16 run the same ops in float64 for this",
            "figure, and are compared with eager autocast as well (decisions/0010).",
            "",
            f"Commit `{self.commit}`, {_today()}: {done} of {len(cells())} cells.",
        ]
        for precision, micro in itertools.product(PRECISIONS, MICROBATCHES):
            plans = [Cell("", 1, zero, ranks) for zero in STAGES for ranks in RANKS]
            lines += ["", f"## microbatches={micro}, precision={precision}", ""]
            lines += [f"| | {' | '.join(p.plan for p in plans)} |", "|---" * (len(plans) + 1) + "|"]
            for model in MODELS:
                cells_ = [Cell(model, micro, p.zero, p.ranks, precision) for p in plans]
                row = [self._text(cell) for cell in cells_]
                lines.append(f"| {model} | {' | '.join(row)} |")
        return "\n".join([*lines, ""])

    def _text(self, cell: Cell) -> str:
        errors = self.found.get(str(cell))
        if errors is None:
            return ""
        if isinstance(errors, str):
            return "refused" if refused(cell) else errors
        return f"{max(errors.values()):.0e}"
