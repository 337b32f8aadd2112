"""How far an error stays below its law, on a logarithmic scale of ten decades."""

from __future__ import annotations

import math

from markupsafe import Markup

from meshwright.view.svg import Scale, el, picture
from meshwright.view.units import error_text

__all__ = ["error_gauge"]

_WIDTH, _HEIGHT = 240, 18


def error_gauge(error: float, law: float) -> Markup:
    """A bar up to `error`, a mark at `law`; both are relative, the scale ends 10 laws high."""
    top = math.log10(law) + 1
    scale = Scale(top - 10, top, 1, _WIDTH - 1)
    at = scale(min(top, max(top - 10, math.log10(error)))) if error > 0 else 1.0
    limit = scale(math.log10(law))
    class_ = "good" if error <= law else "bad"
    return picture(
        _WIDTH,
        _HEIGHT,
        f"error {error_text(error)}, law {error_text(law)}",
        el("rect", x=1, y=7, width=_WIDTH - 2, height=4, rx=2, class_="track"),
        el("rect", x=1, y=7, width=max(at - 1, 2.0), height=4, rx=2, class_=class_),
        el("circle", cx=max(at, 5.0), cy=9, r=4, class_=class_),
        el("line", x1=limit, x2=limit, y1=1, y2=17, class_="law"),
    )
