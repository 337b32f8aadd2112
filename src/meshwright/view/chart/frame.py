"""The axes of a chart over steps: a light grid, round ticks, a title per axis."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from meshwright.view.svg import Scale, el, join, round_ticks

__all__ = ["Frame", "hover_json"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 26, 34


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart's values go: `x` over steps, `y` upwards."""

    width: int
    height: int
    x: Scale
    y: Scale

    @classmethod
    def of(
        cls, width: int, height: int, steps: tuple[float, float], values: tuple[float, float]
    ) -> Frame:
        """A frame of `width` x `height` pixels around the two ranges."""
        return cls(
            width,
            height,
            Scale(*steps, _LEFT, width - _RIGHT),
            Scale(*values, height - _BOTTOM, _TOP),
        )

    def axes(self, y_title: str, y_text: Callable[[float], str]) -> Markup:
        """The grid, the ticks and the titles; to be drawn below the data."""
        rows = round_ticks(self.y.low, self.y.high, 5)
        return join(
            [
                *(self._row(value, y_text(value)) for value in rows),
                *(self._column(value) for value in self._step_ticks()),
                el("text", y_title, x=0, y=12, class_="axis-title"),
                el("text", "step", x=0, y=self.y.start + 20, class_="axis-title"),
            ]
        )

    def _step_ticks(self) -> list[float]:
        ticks = round_ticks(self.x.low, self.x.high, 4 if self.width < 500 else 9)
        return [value for value in ticks if value == int(value)]

    def _row(self, value: float, text: str) -> Markup:
        y = self.y(value)
        line = el("line", x1=self.x.start, x2=self.x.stop, y1=y, y2=y, class_="grid")
        return line + el("text", text, x=self.x.start - 8, y=y + 4, class_="tick end")

    def _column(self, value: float) -> Markup:
        y = self.y.start
        return el("text", f"{value:,.0f}", x=self.x(value), y=y + 20, class_="tick middle")


def hover_json(frame: Frame, readings: Sequence[tuple[float, str]]) -> str:
    """A chart's readings for the pointer: `(step position, text)` pairs as JSON."""
    return json.dumps(
        {
            "top": frame.y.stop,
            "bottom": frame.y.start,
            "at": [[round(frame.x(step), 1), text] for step, text in readings],
        },
        separators=(",", ":"),
        ensure_ascii=False,
    )
