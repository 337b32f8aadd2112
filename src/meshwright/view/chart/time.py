"""Where a step's time went: in total as one bar, and over steps as stacked columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from meshwright.view.chart.bars import Part, stacked_bar
from meshwright.view.chart.frame import Frame, hover_json
from meshwright.view.chart.smooth import chunks
from meshwright.view.history import Step
from meshwright.view.svg import el, join, picture
from meshwright.view.units import percent_text, seconds_text

__all__ = ["PARTS", "StepTime", "mean_time", "time_chart", "total_bar"]

# The order in which they are stacked, the largest at the bottom as a rule.
PARTS = ("compute", "communication", "update", "data", "other")


@dataclass(frozen=True, slots=True)
class StepTime:
    """The mean seconds per part over the steps from `first` to `last`; `slowest` is one of them."""

    first: int
    last: int
    parts: tuple[tuple[str, float], ...]
    slowest: Step

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(seconds for _, seconds in self.parts)


def mean_time(steps: Sequence[Step]) -> StepTime:
    """The mean over `steps` (at least one); what the parts leave of a step's time is `other`."""
    sums = dict.fromkeys(PARTS, 0.0)
    for step in steps:
        named = 0.0
        for name, seconds in step.time:
            sums[name if name in sums else "other"] += seconds
            named += seconds
        sums["other"] += max(0.0, step.seconds - named)
    means = tuple((name, seconds / len(steps)) for name, seconds in sums.items())
    return StepTime(steps[0].step, steps[-1].step, means, max(steps, key=_seconds))


def _seconds(step: Step) -> float:
    return max(step.seconds, sum(seconds for _, seconds in step.time))


def total_bar(time: StepTime, width: int) -> Markup:
    """The mean step as one bar."""
    parts = [
        Part(f"part-{name}", seconds, f"{name} {seconds_text(seconds)}", percent_text(share))
        for name, seconds in time.parts
        if (share := seconds / time.total if time.total else 0) > 0
    ]
    bar = stacked_bar(parts, time.total, (0, 0, width, 30))
    return picture(width, 30, "Where the mean step's time went", bar)


def time_chart(steps: Sequence[Step], width: int) -> Markup:
    """Stacked columns over steps; a column past the frame is cut and says so."""
    timed = [step for step in steps if step.seconds or step.time]
    if len(timed) < 2:
        return Markup()
    columns = [mean_time(run) for run in chunks(timed, (width - 66) // 7)]
    half = (timed[-1].step - timed[0].step) / (len(timed) - 1) / 2
    span = (timed[0].step - half, timed[-1].step + half)
    frame = Frame.of(width, 240 if width > 500 else 210, span, (0, _ceiling(columns)))
    edges = [span[0], *(_edge(a, b) for a, b in pairwise(columns)), span[1]]
    places = zip(columns, edges, edges[1:], strict=False)
    drawn = [_column(frame, column, (start, stop)) for column, start, stop in places]
    drawn.append(_cut(frame, max(zip(columns, edges, edges[1:], strict=False), key=_height)))
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    hover = hover_json(frame, [(at, _reading(c)) for at, c in zip(middles, columns, strict=True)])
    unit, factor = ("ms", 1e3) if frame.y.high < 1 else ("s", 1)
    axes = frame.axes(f"{unit} per step", lambda value: f"{value * factor:,.6g}")
    label = "Time per step over the run"
    return picture(width, frame.height, label, axes, *drawn, hover=hover)


def _edge(left: StepTime, right: StepTime) -> float:
    return (left.last + right.first) / 2


def _ceiling(columns: Sequence[StepTime]) -> float:
    """The frame's top: a few slow steps (the first one compiles) must not flatten all others."""
    totals = sorted(column.total for column in columns)
    usual = totals[len(totals) * 9 // 10 - 1 if len(totals) >= 10 else (len(totals) - 1) // 2]
    return 1.08 * (totals[-1] if totals[-1] < 2.5 * usual else 1.5 * usual) or 1.0


def _column(frame: Frame, time: StepTime, steps: tuple[float, float]) -> Markup:
    left, right = frame.x(steps[0]), frame.x(steps[1])
    gap = 1.0 if right - left > 3 else 0.0
    width = min(right - left - gap, 40.0)
    left = (left + right - width) / 2
    pieces, below = [], 0.0
    for name, seconds in time.parts:
        low, high = frame.y(min(below, frame.y.high)), frame.y(min(below + seconds, frame.y.high))
        below += seconds
        if low - high > 0.05:
            size = {"x": left, "y": high, "width": width, "height": low - high}
            pieces.append(el("rect", class_=f"part-{name}", **size))
    return join(pieces)


Place = tuple[StepTime, float, float]


def _height(place: Place) -> float:
    return place[0].total


def _cut(frame: Frame, highest: Place) -> Markup:
    """A mark above the highest column where it goes on past the frame, and what it comes from."""
    time, start, stop = highest
    if time.total <= frame.y.high:
        return Markup()
    x, y = frame.x((start + stop) / 2), frame.y.stop
    mark = f"M{x - 4:.1f} {y - 2:.1f}L{x:.1f} {y - 8:.1f}L{x + 4:.1f} {y - 2:.1f}Z"
    side, class_ = (-8, "tick end") if x > frame.x.stop - 130 else (8, "tick")
    text = f"step {time.slowest.step:,} took {seconds_text(_seconds(time.slowest))}"
    return el("path", d=mark, class_="cut") + el("text", text, x=x + side, y=y - 2, class_=class_)


def _reading(time: StepTime) -> str:
    where = f"step {time.first:,}"
    if time.last != time.first:
        where = f"steps {time.first:,}–{time.last:,}, mean"
    rows = [f"{name} {seconds_text(seconds)}" for name, seconds in time.parts if seconds]
    return "\n".join([where, f"{seconds_text(time.total)} in all", *reversed(rows)])
