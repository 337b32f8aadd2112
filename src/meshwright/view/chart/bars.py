"""Horizontal stacked bars: one bar of labelled parts, with hair lines of paper between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from meshwright.view.svg import Scale, el, join, tip

__all__ = ["Part", "stacked_bar"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar: the class that colours it, its size, its tooltip, its inside label."""

    class_: str
    size: float
    tooltip: str
    label: str = ""


def stacked_bar(parts: Sequence[Part], full: float, box: Box) -> Markup:
    """`parts` one after another in `box` (x, y, width, height), which `full` would fill."""
    x, y, width, height = box
    scale = Scale(0, full or 1, x, x + width)
    drawn, start = [], 0.0
    for part in parts:
        left, right = scale(start), scale(start + part.size)
        start += part.size
        drawn.append(_piece(part, (left, y, max(right - left - 1, 0.5), height)))
    return join(drawn)


def _piece(part: Part, box: Box) -> Markup:
    x, y, width, height = box
    size = {"x": x, "y": y, "width": width, "height": height}
    piece = el("rect", tip(part.tooltip), class_=part.class_, rx=2, **size)
    if not part.label or width < 7.5 * len(part.label) + 8:
        return piece
    middle = {"x": x + width / 2, "y": y + height / 2 + 4}
    return piece + el("text", part.label, class_=f"inside on-{part.class_}", **middle)
