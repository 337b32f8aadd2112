"""A traced step of a pipeline: when each action ran, and when its schedule says that it would.

The schedule is read off the trace: which stages each rank ran, and in which order. Every action is
predicted to take the median of what its stage and kind took in that step; messages take no time.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Kind, Schedule
from meshwright.schedule.simulate import Account, Seconds, Span, account, timeline
from meshwright.view.parts import Part

__all__ = ["Pipelined", "action_of", "pipelined"]


@dataclass(frozen=True, slots=True)
class Pipelined:
    """One step; times are seconds since its first action began.

    Attributes:
        ranks: those that are shown, one for each pipeline rank.
        measured, predicted: of every action.
    """

    ranks: tuple[int, ...]
    measured: tuple[Span, ...]
    predicted: tuple[Span, ...]

    @property
    def accounts(self) -> tuple[Account, Account]:
        """Where time went, measured and predicted."""
        return account(self.measured), account(self.predicted)


def pipelined(parts: Sequence[Part], step: int) -> Pipelined | None:
    """A step's actions; None where it has none, or not all of a schedule's are in the trace."""
    shown = _shown({part.rank: _actions(part, step) for part in parts})
    if not shown:
        return None
    zero = min(begin for actions in shown.values() for begin, _ in actions.values())
    measured = tuple(
        Span(place, action, begin - zero, end - zero)
        for place, actions in enumerate(shown.values())
        for action, (begin, end) in actions.items()
    )
    try:
        predicted = timeline(_schedule(measured), _seconds(measured))
    except PlanError:  # of an asynchronous pipeline, or what a killed rank left
        return None
    return Pipelined(tuple(shown), measured, predicted)


def action_of(text: str) -> Action:
    """What `str` made of an action.

    >>> action_of("12F3")
    Action(stage=12, kind='F', microbatch=3)
    """
    (kind,) = (letter for letter in text if letter.isalpha())
    stage, _, microbatch = text.partition(kind)
    return Action(int(stage), cast("Kind", kind), int(microbatch))


_Times = Mapping[Action, tuple[float, float]]


def _actions(part: Part, step: int) -> _Times:
    """From the first to the last of what an action runs."""
    found: dict[Action, tuple[float, float]] = {}
    for piece in part.slices:
        if piece.step == step and "action" in piece.what:
            action = action_of(piece.what["action"])
            begin, _ = found.get(action, (piece.began, 0.0))
            found[action] = begin, piece.ended
    return found


def _shown(found: Mapping[int, _Times]) -> dict[int, _Times]:
    """Of ranks that run the same stages the first one; in the order of their first stages."""
    once: dict[tuple[int, ...], int] = {}
    for rank, actions in sorted(found.items()):
        if actions:
            once.setdefault(tuple(sorted({action.stage for action in actions})), rank)
    return {rank: found[rank] for _, rank in sorted(once.items())}


def _schedule(spans: Sequence[Span]) -> Schedule:
    ranks: dict[int, list[Action]] = defaultdict(list)
    placement: dict[int, int] = {}
    for span in spans:
        ranks[span.rank].append(span.action)
        placement[span.action.stage] = span.rank
    if sorted(placement) != [*range(len(placement))]:
        raise PlanError(f"of the stages only {sorted(placement)} were traced")
    return Schedule(
        "traced",
        tuple(placement[stage] for stage in sorted(placement)),
        1 + max(span.action.microbatch for span in spans),
        tuple(tuple(actions) for actions in ranks.values()),
    )


def _seconds(spans: Sequence[Span]) -> Seconds:
    stages = 1 + max(span.action.stage for span in spans)

    def median(kind: str) -> Iterator[float]:
        for stage in range(stages):
            mine = (s for s in spans if (s.action.stage, s.action.kind) == (stage, kind))
            yield statistics.median([s.end - s.begin for s in mine] or [0.0])

    forward, inputs, weights, backward = (tuple(median(kind)) for kind in "FIWB")
    return Seconds(forward, inputs, weights, (0.0,) * (stages - 1), backward)
