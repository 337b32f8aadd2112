"""A step of a pipeline: of each rank what was predicted, and below it what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from meshwright.schedule.simulate import Span
from meshwright.view.pipelined import Pipelined
from meshwright.view.svg import Scale, el, join, picture, round_ticks, tip
from meshwright.view.units import seconds_text

__all__ = ["kinds_of", "pipeline"]

_KINDS = (
    ("F", "forward", "action-f"),
    ("B", "backward", "action-b"),
    ("I", "backward for inputs", "action-b"),
    ("W", "backward for weights", "action-w"),
)
_CLASSES = {kind: class_ for kind, _, class_ in _KINDS}
_TOP, _BAND, _BETWEEN, _GAP, _BOTTOM = 4, 18, 3, 14, 34
_LEFT, _RIGHT = 118, 4
_DIGIT = 7.0


def kinds_of(step: Pipelined) -> tuple[tuple[str, str], ...]:
    """What is drawn and the class of its colour, for the legend."""
    found = {span.action.kind for span in step.measured}
    return tuple((name, class_) for kind, name, class_ in _KINDS if kind in found)


def pipeline(step: Pipelined, width: int) -> Markup:
    """All of it on one scale, hatched where a rank waits."""
    ends = [max(span.end for span in spans) for spans in (step.predicted, step.measured)]
    x = Scale(0.0, max(ends), _LEFT, width - _RIGHT)
    row = 2 * _BAND + _BETWEEN + _GAP
    bottom = _TOP + row * len(step.ranks) - _GAP
    hatch = f"hatch-{width}"
    rows = [
        _rank(step, place, x, _TOP + row * place, ends, hatch) for place in range(len(step.ranks))
    ]
    label = "One step of the pipeline on every rank, as predicted and as measured"
    drawn = (_pattern(hatch), _axis(x, bottom + 8, width), *rows)
    return picture(width, bottom + _BOTTOM, label, *drawn)


def _rank(
    step: Pipelined, place: int, x: Scale, top: float, ends: Sequence[float], hatch: str
) -> Markup:
    """Its two bands and what they are."""
    drawn = [el("text", f"rank {step.ranks[place]}", x=0, y=top + 13, class_="row-label")]
    bands = zip(("predicted", "measured"), (step.predicted, step.measured), ends, strict=True)
    for index, (name, spans, end) in enumerate(bands):
        at = top + index * (_BAND + _BETWEEN)
        drawn.append(el("text", name, x=_LEFT - 8, y=at + 13, class_="tick end"))
        drawn += _band([span for span in spans if span.rank == place], x, at, end, hatch)
    return el("g", *drawn)


def _pattern(name: str) -> Markup:
    line = el("path", d="M0 0V6", class_="hatch")
    how = {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    return el("defs", el("pattern", line, id=name, width=6, height=6, **how))


def _band(spans: Sequence[Span], x: Scale, top: float, end: float, hatch: str) -> Iterator[Markup]:
    """Hatched from end to end, with its actions upon it."""
    yield el("rect", x=x(0.0), y=top, width=x(end) - x(0.0), height=_BAND, fill=f"url(#{hatch})")
    for span in spans:
        left, wide = x(span.begin), max(x(span.end) - x(span.begin) - 0.5, 0.25)
        text = f"{span.action}\n{seconds_text(span.end - span.begin)}"
        yield el(
            "rect", tip(text), class_=_CLASSES[span.action.kind], x=f"{left:.2f}", y=top,
            width=f"{wide:.2f}", height=_BAND,
        )  # fmt: skip
        number = str(span.action.microbatch)
        if wide > _DIGIT * len(number) + 2:
            yield el("text", number, x=left + wide / 2, y=top + 13, class_="on-action middle")


def _axis(x: Scale, bottom: float, width: int) -> Markup:
    unit, factor = ("ms", 1e3) if x.high < 1 else ("s", 1.0)
    drawn = [el("text", unit, x=0, y=bottom + 16, class_="axis-title")]
    for tick in round_ticks(0, x.high * factor, 4 if width < 500 else 9):
        at = x(tick / factor)
        drawn.append(el("line", x1=at, x2=at, y1=0, y2=bottom, class_="grid"))
        drawn.append(el("text", f"{tick:,.6g}", x=at, y=bottom + 16, class_="tick middle"))
    return join(drawn)
