"""The text form of a schedule: torch's, one line per rank, so that either reads the other's.

    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1

An action is stage, kind, micro-batch. Empty items (torch writes a rank's bubbles so) say nothing.
"""

from __future__ import annotations

import re
from typing import cast

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Kind, Schedule

__all__ = ["from_text", "to_text"]

_ACTION = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
_PAIR = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


def to_text(schedule: Schedule) -> str:
    """One line per rank, each ended."""
    return "".join(",".join(map(str, order)) + "\n" for order in schedule.ranks)


def from_text(text: str, name: str = "text") -> Schedule:
    """The schedule that `text` writes; its placement is where its stages stand.

    Nothing but the form is looked at here: `check` says whether it can run.

    Raises:
        PlanError: an item is no action, a stage is on two ranks or on none.
    """
    lines = text.rstrip("\n").split("\n")
    ranks = tuple(_line(name, number, line) for number, line in enumerate(lines, 1))
    homes: dict[int, int] = {}
    for rank, order in enumerate(ranks):
        for action in order:
            if homes.setdefault(action.stage, rank) != rank:
                raise PlanError(
                    f"schedule {name}: stage {action.stage} is on line {homes[action.stage] + 1}"
                    f" and, with {action}, on line {rank + 1}; a stage stays on one rank"
                )
    if not homes:
        raise PlanError(f"schedule {name} has no actions; write one line per rank: 0F0,0B0")
    lacking = next((stage for stage in range(max(homes)) if stage not in homes), None)
    if lacking is not None:
        raise PlanError(
            f"schedule {name} has stage {max(homes)} but no stage {lacking};"
            " stages are counted from 0 without gaps"
        )
    count = 1 + max(action.microbatch for order in ranks for action in order)
    return Schedule(name, tuple(homes[stage] for stage in range(len(homes))), count, ranks)


def _line(name: str, number: int, line: str) -> tuple[Action, ...]:
    items = _PAIR.sub(lambda pair: pair[1].replace(";", ","), line).split(",")
    found = (_action(name, number, place, item.strip()) for place, item in enumerate(items, 1))
    return tuple(action for action in found if action is not None)


def _action(name: str, line: int, place: int, item: str) -> Action | None:
    if not item:
        return None
    match = _ACTION.fullmatch(item)
    if match is None:
        raise PlanError(
            f"schedule {name}, line {line}, item {place}: {item!r} is not an action; write stage,"
            " F, B, I or W, and micro-batch, as in 2F0"
        )
    return Action(int(match[1]), cast(Kind, match[2]), int(match[3]))
