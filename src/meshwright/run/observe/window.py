"""Which steps of a run are traced; the command line reads this before torch is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meshwright.errors import UsageError

__all__ = ["Steps", "parse_steps", "within"]

WARM_UP, USUAL = 2, 5


@dataclass(frozen=True, slots=True)
class Steps:
    """Which steps to trace, as they are numbered for users (from 1), both included."""

    first: int
    last: int


def parse_steps(text: str) -> Steps:
    """`3-7` or `5`.

    Raises:
        UsageError: it is neither, or no step is in it.
    """
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise UsageError(f"trace steps {text!r}; give one, as in 5, or a range, as in 3-7")
    steps = Steps(int(first), int(last if dash else first))
    if not 1 <= steps.first <= steps.last:
        raise UsageError(
            f"trace steps {text!r}: steps count from 1, and the range must not be empty"
        )
    return steps


def within(wanted: Steps | Literal[True], done: int, total: int | None) -> Steps:
    """The steps to trace of a start that goes from `done` to `total` (None: nobody knows).

    By default five, after two to warm up; fewer where there are fewer.

    Raises:
        UsageError: those wanted are not all among the start's steps.
    """
    if wanted is True:
        most = done + WARM_UP + USUAL if total is None else max(total, done + 1)
        return Steps(min(done + WARM_UP + 1, most), min(done + WARM_UP + USUAL, most))
    if wanted.first <= done or (total is not None and wanted.last > total):
        taken = f"{done + 1} on" if total is None else f"{done + 1} to {total}"
        raise UsageError(
            f"trace steps {wanted.first}-{wanted.last}, but this start takes steps {taken}; trace "
            "some of these"
        )
    return wanted
