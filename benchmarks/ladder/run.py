"""The ladder from rung to rung, ours and DeepSpeed's: the part `ladder` of `make bench`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ladder.climb import Outcome, largest, tried
from benchmarks.ladder.rungs import CONTEXT, GIB, RANKS, ROWS, RUNGS, Trial, guessed, parameters

SIDES = ("ours", "deepspeed")
HOST = 2  # memory beside each rank, over its own, where the machine has as much
SPARE = 2 * GIB  # what the machine keeps for itself
RUNG_SECONDS, TRIAL_SECONDS = 60.0, 300.0  # the latter in 2 GiB a rank
_TINY, _STEPS = 64, 3


@dataclass(frozen=True, slots=True)
class Reached:
    """The largest model of one side on one rung; `outcome` None: it did not run."""

    outcome: Outcome | None
    reason: str

    @property
    def parameters(self) -> int:
        """Of the model."""
        return parameters(self.outcome.width) if self.outcome else 0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        assert self.outcome is not None
        return RANKS * ROWS * CONTEXT / statistics.median(self.outcome.seconds)


def beside(memory: int) -> int:
    """Bytes of the host's memory that ranks of `memory` may have together, beside their own."""
    there = psutil.virtual_memory().total - RANKS * memory - SPARE
    return max(0, min(RANKS * HOST * memory, there))


def climbed(
    memory: int,
    folder: Path,
    say: Callable[[str], None],
    *,
    reasons: Mapping[str, str],
    patience: float = 1.0,
) -> dict[str, list[Reached]]:
    """Every rung of both sides.

    Args:
        memory: bytes that a rank may have of its own.
        folder: on the disk that is offloaded to.
        say: progress.
        reasons: of peers that are not installed.
        patience: times each rung's time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Reached]] = {}
    for side in SIDES:
        found[side] = []
        for number, rung in enumerate(RUNGS):
            say(f"{side}, {rung.what}, in {memory / GIB:g} GiB a rank")
            if side in reasons:
                found[side].append(Reached(None, reasons[side]))
                continue
            begun = found[side][-1].outcome if found[side] else None
            found[side].append(_reached(side, number, memory, folder, say, patience, begun))
    return found


def _reached(
    side: str,
    number: int,
    memory: int,
    folder: Path,
    say: Callable[[str], None],
    patience: float,
    below: Outcome | None,
) -> Reached:
    """One rung; what a side cannot run at all is seen on a tiny model without limits.

    There DeepSpeed also compiles its C++, which takes more memory than its training.
    """
    host = beside(memory)
    if side != "ours":
        first = tried(Trial(side, number, _TINY, 64 * GIB, "", steps=_STEPS), 64 * GIB, folder)
        if not first.fits:
            say(first.reason)
            return Reached(None, first.reason)
    guess = guessed(RUNGS[number], memory, host)
    if side != "ours" and below is not None:  # its host memory is its own
        guess = below.width
    good, bad = largest(
        lambda width: tried(
            Trial(side, number, width, memory, "", steps=_STEPS),
            host,
            folder,
            TRIAL_SECONDS * max(1.0, memory / (2 * GIB)),
        ),
        guess,
        say,
        RUNG_SECONDS * patience,
    )
    why = "" if bad is None else bad.reason
    return Reached(good, why)


def as_raw(found: Mapping[str, list[Reached]], memory: int) -> dict[str, Any]:
    """Plain data for the page."""
    return {
        "memory_bytes": memory,
        "host_bytes": beside(memory) // RANKS,
        "sides": {
            side: [
                {
                    "what": rung.what,
                    "plan": rung.plan,
                    "reason": reached.reason,
                    "parameters": reached.parameters,
                    "speed": reached.speed if reached.outcome else 0.0,
                    **({} if reached.outcome is None else asdict(reached.outcome)),
                }
                for rung, reached in zip(RUNGS, all_reached, strict=True)
            ]
            for side, all_reached in found.items()
        },
    }
