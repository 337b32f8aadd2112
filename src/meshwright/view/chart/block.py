"""One block as a picture: a box per module from top to bottom, and the collectives between them.

A box says what the module reads and makes; dims that are split are set in bold, with their axes. A
collective that ranks must wait for is filled; one that is overlapped is an outline. `↓` is on the
way forward, `↑` on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from meshwright.view.accounts import Block, Collective, Station
from meshwright.view.layouts import change
from meshwright.view.svg import el, join, picture, tip
from meshwright.view.traffic import added, hidden_text
from meshwright.view.units import bytes_text

__all__ = ["block_picture", "of_state"]

_GAP, _PILL, _SPINE, _CHARACTER = 8, 26, 22, 6.6
_WIDE = 500
_MOST = 40


@dataclass(frozen=True, slots=True)
class _Row:
    """A part of the picture and how high it is."""

    height: float
    drawn: Markup


def block_picture(block: Block, width: int) -> Markup:
    """The block's stations, the first forty of them, and below what is moved of its state."""
    shown, own = block.stations[:_MOST], block.name or "the model"
    rows = [row for station in shown for row in _station(station, own, width)]
    spine = sum(row.height + _GAP for row in rows) - _GAP
    rows += [_pill(sign, row, what, width) for sign, what, row in of_state(block)]
    y, parts = 0.5, []
    for row in rows:
        parts.append(el("g", row.drawn, transform=f"translate(0 {y:.1f})"))
        y += row.height + _GAP
    line = el("line", x1=_SPINE, x2=_SPINE, y1=8, y2=max(spine, 8.0), class_="spine")
    names = ", ".join(station.module or "its own ops" for station in shown)
    label = f"{own}, from top to bottom: {names}"
    return picture(width, max(y - _GAP, 1.0), label, line, *parts)


def _station(station: Station, own: str, width: int) -> Iterator[_Row]:
    for row in added(row for row in station.before if not row.state):
        yield _pill("↓", row, change(row.why, row.axis), width)
    yield _box(station, own, width)
    for row in added(row for row in station.backward if not row.state):
        yield _pill("↑", row, change(row.why, row.axis), width)


def _box(station: Station, own: str, width: int) -> _Row:
    """A module (`own` for the block's own ops): its name, and dims of what it reads and makes."""
    wide = width > _WIDE
    weights = [(name, dims) for name, dims in station.weights if dims]
    reads = _dims(max(weights, key=lambda found: len(found[1]))[1]) if weights else Markup()
    owes = f", partial over {' and '.join(station.owes)}" if station.owes else ""
    makes = join([_dims(station.dims) or "a scalar", owes])
    hover = "\n".join(
        [station.module or own, station.source]
        + [f"{name}: {' × '.join(dims)}" for name, dims in station.weights]
    )
    name = _cut(station.module or own, (width - 24) * (0.28 if wide else 1))
    height = 34.0 if wide else 29.0 + 17 * (bool(reads) + 1)
    right = width - 12
    places = (
        [(0.3 * width, 22.0, ""), (right, 22.0, " end")]
        if wide
        else [(12.0, 37.0, ""), (12.0, 37.0 + 17 * bool(reads), "")]
    )
    texts = [
        el("text", text, x=x, y=at, class_=f"dims{end}")
        for text, (x, at, end) in zip((reads, makes), places, strict=True)
        if text
    ]
    size = {"x": 0.5, "y": 0, "width": width - 1, "height": height}
    title = el("text", name, x=12, y=22.0 if wide else 19.0, class_="row-label strong")
    box = el("rect", class_="card", rx=5, **size)
    return _Row(height, el("g", tip(hover), box, title, *texts))


def _dims(dims: Sequence[str]) -> Markup:
    """Dims as text; what is split is bold, and so is the name of the axis."""
    parts = [el("tspan", dim, class_="strong" if "/" in dim else None) for dim in dims]
    return Markup(" × ").join(parts)


def _pill(sign: str, row: Collective, what: str, width: int) -> _Row:
    """A collective: what it is, how much it moves, whether anything is computed beside it."""
    wide = width > _WIDE
    words = [f"{sign} {row.op} over {row.axis}", bytes_text(row.bytes)]
    words += [word for word in (what, hidden_text(row)) if word] if wide else []
    text = _cut(" · ".join(words), width - 60)
    length = min(width - 40.0, _CHARACTER * len(text) + 24)
    kind = "exposed" if row.exposed else "beside"
    size = {"x": 36, "y": 1, "width": length, "height": _PILL - 2}
    shape = el("rect", class_=kind, rx=(_PILL - 2) / 2, **size)
    label = el("text", text, x=36 + length / 2, y=17, class_=f"{kind}-text")
    hover = tip("\n".join(word for word in (words[0], row.why, row.source) if word))
    return _Row(_PILL, el("g", hover, shape, label))


def _cut(text: str, pixels: float) -> str:
    """The text, its end left out where there is no room."""
    most = max(4, int(pixels / _CHARACTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def of_state(block: Block) -> Iterator[tuple[str, str, Collective]]:
    """What is moved of the block's weights and gradients, added up: (direction, what, how)."""
    stations = block.stations
    kinds = {
        ("↓", "for weights"): [r for s in stations for r in s.before if r.state],
        ("↑", "for weights"): [r for s in stations for r in s.backward if r.state == "model"],
        ("↑", "for gradients"): [r for s in stations for r in s.backward if r.state == "gradient"],
        ("", "for weights, after the update"): [r for s in stations for r in s.update],
    }
    for (sign, what), rows in kinds.items():
        for row in added(replace(row, why="") for row in rows):
            yield sign, what, row
