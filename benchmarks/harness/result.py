"""A line that was measured, as the tables, the pictures and the raw file have it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.statistics import Estimate, Sense

FAILED = "did not run"


@dataclass(frozen=True, slots=True)
class Result:
    """One line.

    Attributes:
        section: the row of the reach table that it belongs to.
        key: its name in notes.toml.
        what: for the reader.
        ours, peer, limit: medians, with their unit; empty where there is none.
        found: the ratio; None where a contestant did not run.
        target, sense: as of a `Line`.
        verdict: or `FAILED`.
        reason: why it did not run.
    """

    section: str
    key: str
    what: str
    ours: str
    peer: str
    limit: str
    found: Estimate | None
    target: float
    sense: Sense
    verdict: str
    reason: str = ""

    @property
    def interval(self) -> str:
        """Such as `0.98 .. 1.01`."""
        found = self.found
        if found is None or math.isinf(found.high):
            return ""
        return f"{ratio(found.low)} .. {ratio(found.high)}"

    @property
    def bound(self) -> str:
        """The target as text."""
        signs = {"at least": "≥ ", "at most": "≤ ", "within": "1 ± "}
        return f"{signs[self.sense]}{self.target:g}"


def ratio(value: float) -> str:
    """With as many places as say something."""
    return f"{value:.3f}" if value < 2 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def failed(section: str, key: str, what: str, target: float, sense: Sense, reason: str) -> Result:
    """A line without numbers."""
    return Result(section, key, what, "", "", "", None, target, sense, FAILED, reason)


def as_json(result: Result) -> dict[str, Any]:
    """Plain data; JSON has no infinity, so an open interval is null."""
    found = asdict(result)
    if result.found is not None and math.isinf(result.found.high):
        found["found"] |= {"low": None, "high": None}
    return found


def from_json(data: dict[str, Any]) -> Result:
    """What `as_json` wrote."""
    found = data["found"]
    if found is not None:
        low = -math.inf if found["low"] is None else found["low"]
        high = math.inf if found["high"] is None else found["high"]
        found = Estimate(found["median"], low, high, found["n"])
    return Result(**{**data, "found": found})
