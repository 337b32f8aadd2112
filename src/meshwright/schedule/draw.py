"""The timeline of a schedule as a picture: text with columns of equal width, and SVG.

    rank 0  0F0 0F1   . 0B0 --- 0B1 ---
    rank 1    . 1F0 1B0 --- 1F1 1B1 ---

In text, a dot is a bubble and dashes are the rest of a long action. In SVG, bubbles are hatched, a
box has its micro-batch's number, and stages further round the ranks are drawn paler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape

from meshwright.schedule.action import Schedule
from meshwright.schedule.simulate import Seconds, Span, account, timeline

__all__ = ["columns", "steps", "svg"]


def steps(schedule: Schedule) -> tuple[Span, ...]:
    """The timeline with every action as long as any other: the picture of the order alone."""
    one = (1.0,) * schedule.stages
    return timeline(schedule, Seconds(one, one, one, (0.0,) * (schedule.stages - 1), one))


def columns(spans: Sequence[Span], unit: float | None = None) -> str:
    """A line for each rank; a column is `unit` long, by itself as long as the shortest action."""
    unit = unit or min((s.end - s.begin for s in spans if s.end > s.begin), default=1.0)
    width = max(len(str(span.action)) for span in spans)
    rows = _rows(spans)
    wide = len(str(len(rows) - 1))
    lines = (_line(_cells(row, unit), width) for row in rows)
    return "".join(f"rank {rank:{wide}}  {line}\n" for rank, line in enumerate(lines))


def _line(cells: Sequence[str], width: int) -> str:
    return " ".join(cell.rjust(width, "-" if cell == "-" else " ") for cell in cells)


def _rows(spans: Sequence[Span]) -> list[list[Span]]:
    rows: list[list[Span]] = [[] for _ in range(1 + max(span.rank for span in spans))]
    for span in spans:
        rows[span.rank].append(span)
    return rows


def _cells(row: Sequence[Span], unit: float) -> list[str]:
    cells: list[str] = []
    for span in row:
        begin, end = (math.floor(at / unit + 0.5) for at in (span.begin, span.end))
        cells += ["."] * (begin - len(cells))
        cells += [str(span.action)] + ["-"] * (end - len(cells) - 1)
    return cells


# ── SVG ──────────────────────────────────────────────────────────────────────────────────────────

_LEFT, _TOP, _ROW, _BOX, _FOOT = 60, 34, 26, 20, 26
_KINDS: Final = (
    ("F", "forward"),
    ("B", "backward"),
    ("I", "backward of inputs"),
    ("W", "backward of weights"),
)
_STYLE: Final = """
.schedule text { font: 11px system-ui, sans-serif; fill: #24292f }
.schedule .number { font-size: 10px; text-anchor: middle; fill: #10151c; pointer-events: none }
.schedule .end { text-anchor: end } .schedule .tick { text-anchor: middle; fill: #59636e }
.schedule .grid { stroke: #8c959f; stroke-opacity: .35 }
.schedule rect { stroke: #fff; stroke-width: .6 }
.schedule .paper { fill: #fff; stroke: none }
.schedule .F { fill: #8ab6f2 } .schedule .B { fill: #7fcf9a }
.schedule .I { fill: #9fdcc6 } .schedule .W { fill: #f3c677 }
.schedule .bubble { stroke: none } .schedule .lines { stroke: #8c959f; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  .schedule .paper { fill: #0d1117 }
  .schedule text { fill: #d1d7e0 } .schedule .number { fill: #10151c }
  .schedule .tick { fill: #9198a1 } .schedule rect { stroke: #0d1117 }
}
"""


def svg(spans: Sequence[Span], width: int = 920, unit: str = "") -> str:
    """The picture as a document of its own, `width` CSS pixels wide; `unit` is that of time."""
    rows, total = _rows(spans), account(spans)
    height = _TOP + _ROW * len(rows) + _FOOT
    scale = (width - _LEFT - 14) / total.makespan if total.makespan else 0.0
    body = [
        *_legend(spans, total.fraction),
        *_axis(total.makespan, scale, _TOP + _ROW * len(rows), unit),
        *(
            part
            for rank, row in enumerate(rows)
            for part in _lane(rank, row, scale, total.makespan)
        ),
    ]
    label = f"timeline of {len(rows)} ranks, {total.fraction:.1%} of it bubbles"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="schedule" role="img" width="{width}"'
        f' height="{height}" viewBox="0 0 {width} {height}" aria-label="{label}">\n'
        f"<style>{_STYLE}</style>\n"
        '<defs><pattern id="bubble" width="6" height="6" patternUnits="userSpaceOnUse"'
        ' patternTransform="rotate(45)"><path class="lines" d="M0 0V6" stroke-opacity=".8"/>'
        '</pattern></defs>\n<rect class="paper" width="100%" height="100%"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _legend(spans: Sequence[Span], bubbles: float) -> Iterator[str]:
    found = {span.action.kind for span in spans}
    x = float(_LEFT)
    entries = [(f'class="{kind}"', name) for kind, name in _KINDS if kind in found]
    for paint, name in (*entries, (_HATCH, f"bubble, {bubbles:.1%} of all ranks' time")):
        yield f'<rect {paint} x="{_n(x)}" y="9" width="14" height="12" rx="2"/>'
        yield f'<text x="{_n(x + 19)}" y="19">{escape(name)}</text>'
        x += 19 + 6.0 * len(name) + 18


_HATCH: Final = 'class="bubble" fill="url(#bubble)"'


def _axis(makespan: float, scale: float, foot: float, unit: str) -> Iterator[str]:
    for value in _ticks(makespan):
        x = _n(_LEFT + value * scale)
        yield f'<path class="grid" d="M{x} {_TOP - 4}V{_n(foot)}"/>'
        yield f'<text class="tick" x="{x}" y="{_n(foot + 15)}">{value:g}{escape(unit)}</text>'


def _ticks(makespan: float) -> list[float]:
    """At most some ten round values from 0 on."""
    if makespan <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(makespan / 10))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= makespan / 10 * (1 - 1e-9))
    return [round(index * step, 12) for index in range(math.floor(makespan / step + 1e-9) + 1)]


def _lane(rank: int, row: Sequence[Span], scale: float, makespan: float) -> Iterator[str]:
    y = _TOP + _ROW * rank + (_ROW - _BOX) / 2
    chunks = sorted({span.action.stage for span in row})
    yield f'<text class="end" x="{_LEFT - 8}" y="{_n(y + 14)}">rank {rank}</text>'
    yield (
        f'<rect {_HATCH} x="{_LEFT}" y="{_n(y)}" width="{_n(makespan * scale)}" height="{_BOX}"/>'
    )
    for span in row:
        yield from _box(span, y, scale, chunks.index(span.action.stage) / max(len(chunks), 2))


def _box(span: Span, y: float, scale: float, pale: float) -> Iterator[str]:
    """One action; a paler one lies on white, so that the hatching does not show through."""
    action, begin, wide = span.action, _LEFT + span.begin * scale, (span.end - span.begin) * scale
    where = f'x="{_n(begin)}" y="{_n(y)}" width="{_n(wide)}" height="{_BOX}"'
    tip = f"<title>{action}: {span.begin:g} to {span.end:g}</title>"
    if pale:
        yield f'<rect fill="#fff" {where}/>'
    yield f'<rect class="{action.kind}" fill-opacity="{1 - 0.75 * pale:.2f}" {where}>{tip}</rect>'
    number = str(action.microbatch)
    if wide >= 5.8 * len(number) + 1:
        yield f'<text class="number" x="{_n(begin + wide / 2)}" y="{_n(y + 14)}">{number}</text>'


def _n(value: float) -> str:
    """A short number of pixels."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
