"""What `metrics.jsonl` says: the steps, evaluations and notes of a run, in order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.view.fields import finite, integer, mapping, numbers, text

__all__ = ["Evaluation", "History", "Note", "Step", "parse_history"]

# What the run itself writes beside the user's metrics.
_OWN = frozenset({"step", "loss", "samples", "seconds", "time"})


@dataclass(frozen=True, slots=True)
class Step:
    """A logged step. `loss` is None where it was not finite; `time` and `seconds` in seconds."""

    step: int
    loss: float | None
    seconds: float
    samples: int
    time: tuple[tuple[str, float], ...]
    metrics: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out metrics after `step` steps."""

    step: int
    values: tuple[tuple[str, float], ...]

    @property
    def loss(self) -> float | None:
        """The held-out loss, where it was measured and finite."""
        return dict(self.values).get("loss")


@dataclass(frozen=True, slots=True)
class Note:
    """Something the run wanted to be known, and the step it was at."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class History:
    """All that was logged; `unread` counts lines that were not JSON objects (a torn last one)."""

    steps: tuple[Step, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    notes: tuple[Note, ...] = ()
    unread: int = 0


def parse_history(lines: Iterable[str]) -> History:
    """The history in `lines`; where a resumed run did a step again, the later line counts."""
    steps: dict[int, Step] = {}
    evaluations: dict[int, Evaluation] = {}
    notes: list[Note] = []
    unread = 0
    for line in filter(str.strip, lines):
        record = _decode(line)
        if record is None:
            unread += 1
            continue
        at = integer(record.get("step"))
        if "note" in record:
            notes.append(Note(at, text(record["note"])))
        elif "evaluation" in record:
            evaluations[at] = Evaluation(at, numbers(record["evaluation"]))
        else:
            steps[at] = _step(at, record)
    return History(
        steps=tuple(steps[at] for at in sorted(steps)),
        evaluations=tuple(evaluations[at] for at in sorted(evaluations)),
        notes=tuple(notes),
        unread=unread,
    )


def _decode(line: str) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return mapping(record) or None


def _step(at: int, record: Mapping[str, Any]) -> Step:
    own = {name: value for name, value in record.items() if name not in _OWN}
    return Step(
        step=at,
        loss=finite(record.get("loss")),
        seconds=finite(record.get("seconds")) or 0.0,
        samples=integer(record.get("samples")),
        time=numbers(record.get("time")),
        metrics=numbers(own),
    )
