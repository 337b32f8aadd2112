"""A tensor's layout as a small tape: whole, or one of so many parts."""

from __future__ import annotations

from markupsafe import Markup

from meshwright.view.svg import el, picture

__all__ = ["layout_tape"]

_WIDTH, _HEIGHT, _MOST = 40, 9, 8


def layout_tape(kind: str, layout: str, shards: int) -> Markup:
    """The part a rank holds filled, the others' parts empty; `shards` 0 is nothing held."""
    drawn = min(shards, _MOST) or 1
    pitch = (_WIDTH + 1) / drawn
    boxes = [
        el(
            "rect",
            x=index * pitch,
            y=0,
            width=pitch - 1,
            height=_HEIGHT,
            rx=1,
            class_=f"part-{kind}" if shards and not index else "track",
        )
        for index in range(drawn)
    ]
    return picture(_WIDTH, _HEIGHT, f"{kind}: {layout or 'none'}", *boxes)
