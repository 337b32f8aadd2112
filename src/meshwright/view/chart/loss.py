"""The loss over steps: every step faint, the smoothed course strong, held-out points on top."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from meshwright.view.chart.frame import Frame, hover_json
from meshwright.view.chart.smooth import FEW, Bin, Point, bins, smoothed
from meshwright.view.history import History
from meshwright.view.svg import Scale, el, join, picture, tip
from meshwright.view.units import value_text

__all__ = ["loss_chart", "spark_line"]


def loss_chart(history: History, width: int) -> Markup:
    """Training and held-out loss, `width` pixels wide; empty where no loss was logged."""
    train = [(s.step, s.loss) for s in history.steps if s.loss is not None]
    held_out = [(e.step, e.loss) for e in history.evaluations if e.loss is not None]
    if not train and not held_out:
        return Markup()
    course = smoothed(train)
    frame = Frame.of(width, 300 if width > 500 else 240, *_ranges(train, course, held_out))
    most = (width - 66) // 3
    raw = bins(train, most)
    hover = hover_json(frame, _readings(raw, bins(course, most), held_out))
    return picture(
        width,
        frame.height,
        "Loss over steps",
        frame.axes("loss", lambda value: f"{value:,.6g}"),
        _course(frame, raw, course, most),
        *(_held_out_point(frame, point) for point in _thinned(held_out, 60)),
        _line(frame, held_out, "line held-out"),
        hover=hover,
    )


def _ranges(
    train: Sequence[Point], course: Sequence[Point], held_out: Sequence[Point]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Steps and losses shown. Rare spikes of the raw loss may leave the frame; the rest not."""
    steps = [step for step, _ in (*train, *held_out)]
    raw = sorted(value for _, value in train)
    rare = len(raw) // 200
    shown = [value for _, value in (*course, *held_out)] + raw[rare : len(raw) - rare]
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (min(steps), max(steps)), (low - margin, high + margin)


def _course(frame: Frame, raw: Sequence[Bin], course: Sequence[Point], most: int) -> Markup:
    if len(course) == 1:
        return _dot(frame, course[0], "dot train")
    means = [(b.middle, b.mean) for b in bins(course, most)]
    shown = course if len(course) < FEW else ()
    dots = [_dot(frame, point, "dot train") for point in shown]
    return join([_band(frame, raw), _line(frame, means, "line train"), *dots])


def _band(frame: Frame, raw: Sequence[Bin]) -> Markup:
    """The raw loss: a thin line where each step has its place, else a band of its range."""
    if all(b.first == b.last for b in raw):
        return _line(frame, [(b.middle, b.mean) for b in raw], "line raw")
    above = [(b.middle, b.most) for b in raw]
    below = [(b.middle, b.least) for b in reversed(raw)]
    return el("polygon", points=_path(frame, [*above, *below]), class_="band")


def _line(frame: Frame, points: Sequence[tuple[float, float]], class_: str) -> Markup:
    if len(points) < 2:
        return Markup()
    return el("polyline", points=_path(frame, points), class_=class_)


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    """Pixels of the points; a spike past the frame is cut at its edge."""
    low, high = frame.y.low, frame.y.high
    return " ".join(
        f"{frame.x(step):.1f},{frame.y(min(max(value, low), high)):.1f}" for step, value in points
    )


def _dot(frame: Frame, point: Point, class_: str, radius: float = 2.5) -> Markup:
    step, value = point
    text = tip(f"step {step:,}: {value_text(value)}")
    return el("circle", text, cx=frame.x(step), cy=frame.y(value), r=radius, class_=class_)


def _held_out_point(frame: Frame, point: Point) -> Markup:
    return _dot(frame, point, "dot held-out", 4.0)


def _thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    stride = -(-len(points) // most) if points else 1
    return points[::-1][::stride][::-1]


def _readings(
    raw: Sequence[Bin], course: Sequence[Bin], held_out: Sequence[Point]
) -> list[tuple[float, str]]:
    def one(b: Bin, mean: Bin) -> tuple[float, str]:
        one_step = b.first == b.last
        where = f"step {b.first:,}" if one_step else f"steps {b.first:,}–{b.last:,}"
        text = f"{where}\nloss {value_text(b.mean)}"
        if mean.mean != b.mean:
            text += f"\nsmoothed {value_text(mean.mean)}"
        return b.middle, text

    points = [(float(at), f"step {at:,}\nheld-out loss {value_text(v)}") for at, v in held_out]
    return sorted([one(*pair) for pair in zip(raw, course, strict=True)] + points)


def spark_line(points: Sequence[Point], width: int = 220, height: int = 44) -> Markup:
    """A metric's course without axes; a single point is a dot."""
    means = [(b.middle, b.mean) for b in bins(points, 120)]
    values = [value for _, value in means]
    inner = Frame(
        width,
        height,
        Scale(points[0][0], points[-1][0], 3, width - 5),
        Scale(min(values), max(values), height - 5, 5),
    )
    last = points[-1][0], means[-1][1]
    return picture(
        width,
        height,
        "course over steps",
        _line(inner, means, "line bold"),
        _dot(inner, last, "dot train"),
    )
