"""The mesh as a picture: a card per rank with what it holds of the model, or small cells.

Each card has three tapes. A tape is the whole model laid end to end; the filled part is what the
rank holds of it. Replicated state fills every tape; sharded state fills another part on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from meshwright.view.layouts import KINDS, held
from meshwright.view.runfile import Rank, Setup
from meshwright.view.svg import el, join, picture, tip
from meshwright.view.units import bytes_text, percent_text

__all__ = ["MOST_CELLS", "mesh_picture"]

MOST_CELLS = 256
_MOST_CARDS = 16
_GAP = 12


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def mesh_picture(setup: Setup, width: int) -> Markup:
    """The first 256 ranks of the mesh; the last axis runs across."""
    ranks = setup.ranks[:MOST_CELLS]
    cards = len(ranks) <= _MOST_CARDS
    least, height, gap = (150, 132, _GAP) if cards else (38, 46, 6)
    columns = _columns(setup, len(ranks), (width + gap) // (least + gap))
    cell = min((width + gap) / columns - gap, 300 if cards else 64)
    totals = {memory.rank: memory.total for memory in setup.memory}
    drawn = []
    for index, rank in enumerate(ranks):
        row, column = divmod(index, columns)
        box = _Box(column * (cell + gap) + 0.5, row * (height + gap) + 0.5, cell - 1, height - 1)
        drawn.append(_card(setup, rank, box, totals) if cards else _cell(setup, rank, box))
    rows = -(-len(ranks) // columns)
    label = f"Mesh of {len(setup.ranks)} ranks and what each holds"
    return picture(width, rows * (height + gap) - gap, label, *drawn)


def _columns(setup: Setup, ranks: int, fit: int) -> int:
    """The most columns that fit and divide the last axis, so that rows are rows of the mesh."""
    last = setup.axes[-1][1] if setup.axes else ranks
    divisors = [count for count in range(1, min(last, fit, ranks) + 1) if last % count == 0]
    best = max(divisors, default=1)
    return best if best > 1 or last == 1 else max(1, min(fit, ranks))


def _card(setup: Setup, rank: Rank, box: _Box, totals: Mapping[int, int]) -> Markup:
    x, y, right = box.x + 12, box.y + 24, box.x + box.width - 12
    where = " · ".join(f"{axis} {at}" for axis, at in rank.coordinates)
    parts = [
        _outline(box, 6),
        el("text", f"rank {rank.rank}", x=x, y=y, class_="card-title"),
        el("text", where, x=right, y=y, class_="tick end"),
    ]
    for index, kind in enumerate(KINDS):
        top = box.y + 40 + index * 20
        tape = _Box(x + 64, top, right - x - 64, 10)
        parts += [el("text", kind, x=x, y=top + 9, class_="tick"), _tape(setup, rank, kind, tape)]
    if rank.rank in totals:
        text = bytes_text(totals[rank.rank])
        parts.append(el("text", text, x=right, y=box.y + box.height - 14, class_="total end"))
        parts.append(el("text", "memory", x=x, y=box.y + box.height - 14, class_="tick"))
    return el("g", *parts)


def _cell(setup: Setup, rank: Rank, box: _Box) -> Markup:
    middle, inner = box.x + box.width / 2, box.width - 12
    tapes = [
        _tape(setup, rank, kind, _Box(box.x + 6, box.y + 21 + 7 * index, inner, 4))
        for index, kind in enumerate(KINDS)
    ]
    where = ", ".join(f"{axis} {at}" for axis, at in rank.coordinates)
    number = el("text", f"{rank.rank}", x=middle, y=box.y + 15, class_="tick middle strong")
    return el("g", tip(f"rank {rank.rank}: {where}"), _outline(box, 4), number, *tapes)


def _outline(box: _Box, radius: int) -> Markup:
    size = {"x": box.x, "y": box.y, "width": box.width, "height": box.height}
    return el("rect", class_="card", rx=radius, **size)


def _tape(setup: Setup, rank: Rank, kind: str, box: _Box) -> Markup:
    parts = held(setup.parameters, kind, rank, setup.axes)
    share = sum(stop - start for start, stop in parts)
    size = {"y": box.y, "height": box.height}
    filled = [
        el(
            "rect",
            x=box.x + box.width * start,
            width=max(1.0, box.width * (stop - start)),
            class_=f"part-{kind}",
            **size,
        )
        for start, stop in parts
    ]
    track = el("rect", x=box.x, width=box.width, class_="track", **size)
    text = f"rank {rank.rank} holds {percent_text(share)} of the {kind}"
    return el("g", tip(text), track, join(filled))
