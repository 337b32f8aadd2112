"""The few numbers a run comes down to, computed from what was logged."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from meshwright.view.chart.smooth import smoothed
from meshwright.view.chart.time import StepTime, mean_time
from meshwright.view.folder import Folder
from meshwright.view.history import Evaluation, Step

__all__ = ["Measures", "measure", "steady"]


@dataclass(frozen=True, slots=True)
class Measures:
    """Losses, speed (medians over the steady steps), bytes; None where nothing was logged."""

    first_loss: float | None
    last_loss: float | None
    best: Evaluation | None
    last: Evaluation | None
    not_finite: int
    step_seconds: float | None
    samples_per_second: float | None
    time: StepTime | None
    moved: int
    calls: int
    sent: tuple[int, int]
    memory: int | None


def measure(folder: Folder) -> Measures:
    """The run's measures."""
    history, setup = folder.history, folder.setup
    losses = [(step.step, step.loss) for step in history.steps if step.loss is not None]
    evaluations = [entry for entry in history.evaluations if entry.loss is not None]
    timed = [step for step in steady(history.steps) if step.seconds > 0]
    rates = [step.samples / step.seconds for step in timed if step.samples]
    return Measures(
        first_loss=losses[0][1] if losses else None,
        last_loss=smoothed(losses)[-1][1] if losses else None,
        best=min(evaluations, key=lambda entry: entry.loss or 0.0, default=None),
        last=evaluations[-1] if evaluations else None,
        not_finite=sum(step.loss is None for step in history.steps),
        step_seconds=median(step.seconds for step in timed) if timed else None,
        samples_per_second=median(rates) if rates else None,
        time=mean_time(timed) if any(step.time for step in timed) else None,
        moved=sum(entry.bytes for entry in setup.collectives),
        calls=sum(entry.count for entry in setup.collectives),
        sent=setup.sent,
        memory=max((entry.total for entry in setup.memory), default=None),
    )


def steady(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps without the first of the run, which also traces and warms up."""
    return steps[1:] if len(steps) > 1 else steps
