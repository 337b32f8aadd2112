"""The pieces every picture is made of: escaped elements, scales, round ticks. Pure functions.

A picture is drawn for a width in CSS pixels and never scaled, so its text keeps its size; a page
asks for a wide and a narrow drawing and its style sheet shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["NARROW", "WIDE", "Scale", "both_widths", "el", "join", "picture", "round_ticks", "tip"]

WIDE, NARROW = 920, 350

Attribute = str | float | None


def el(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """An element; text and attributes are escaped, `class_` is `class`, `a_b` is `a-b`.

    >>> el("text", "a<b", x=1.25, class_="tick")
    Markup('<text x="1.2" class="tick">a&lt;b</text>')
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = join(children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>")


def _attribute(value: str | float) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def join(parts: Iterable[str]) -> Markup:
    """The parts after another, each escaped unless it is markup already."""
    return Markup("").join(parts)


def tip(text: str) -> Markup:
    """What a pointer resting on the element shows."""
    return el("title", text)


def picture(width: float, height: float, label: str, *children: str, hover: str = "") -> Markup:
    """A whole drawing; `label` is read aloud in its place, `hover` holds a chart's readings."""
    return el(
        "svg",
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        data_hover=hover or None,
    )


def both_widths(draw: Callable[[int], Markup]) -> Markup:
    """The drawing for a desk and the one for a telephone; the style sheet shows one of them."""
    wide, narrow = (el("div", draw(width), class_=name) for name, width in _WIDTHS)
    return wide + narrow


_WIDTHS = (("wide", WIDE), ("narrow", NARROW))


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map of [low, high] to pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The pixel of `value`; an empty range maps to the middle."""
        if self.high == self.low:
            return (self.start + self.stop) / 2
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def round_ticks(low: float, high: float, about: int) -> tuple[float, ...]:
    """Some `about` round values (1, 2 or 5 times a power of ten) within [low, high].

    >>> round_ticks(0, 10, 5)
    (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
    """
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return (low,)
    rough = span / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / rough)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))
