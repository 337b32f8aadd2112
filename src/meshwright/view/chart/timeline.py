"""One traced step as a band per rank: what its thread did, and below it what was under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from meshwright.view.parts import Part, Slice, transfers
from meshwright.view.svg import Scale, el, join, picture, round_ticks, tip
from meshwright.view.units import bytes_text, seconds_text

__all__ = ["KINDS", "MOST_RANKS", "timeline", "typical_step"]

MOST_RANKS = 8
KINDS = (
    ("forward", "part-forward"),
    ("backward", "part-compute"),
    ("waiting", "part-communication"),
    ("update", "part-update"),
    ("data", "part-data"),
    ("collective under way", "under-way"),
)
"""What is drawn and the class of its colour, for the legend."""

_CLASSES = {
    "Start": "part-communication",
    "Wait": "part-communication",
    "Send": "part-communication",
    "Recv": "part-communication",
    "Agree": "part-communication",
    "Load": "part-data",
    "Free": "part-other",
    "Stash": "part-other",
}
_TOP, _BAND, _THIN, _GAP, _BOTTOM = 4, 24, 6, 16, 34
_LEFT, _RIGHT = 52, 4


@dataclass(frozen=True, slots=True)
class _Block:
    """A stretch of one colour: its longest slice and how many it has."""

    class_: str
    began: float
    ended: float
    longest: Slice
    count: int = 1


def typical_step(parts: Sequence[Part]) -> int:
    """The step of median length among those that all ranks finished; 0 where there is none."""
    shared = set(parts[0].steps).intersection(*(part.steps for part in parts)) if parts else set()

    def length(step: int) -> float:
        spans = [_span(part, step) for part in parts]
        return max(ended for _, ended in spans) - min(began for began, _ in spans)

    ordered = sorted(shared, key=length)
    return ordered[(len(ordered) - 1) // 2] if ordered else 0


def _span(part: Part, step: int) -> tuple[float, float]:
    own = [piece for piece in part.slices if piece.step == step]
    return own[0].began, own[-1].ended


def timeline(parts: Sequence[Part], step: int, width: int) -> Markup:
    """The step on the first eight ranks, on one clock."""
    shown = parts[:MOST_RANKS]
    spans = [_span(part, step) for part in shown]
    zero, end = min(began for began, _ in spans), max(ended for _, ended in spans)
    x = Scale(zero, end, _LEFT, width - _RIGHT)
    row = _BAND + 2 + _THIN + _GAP
    bottom = _TOP + row * len(shown) - _GAP
    rows = [_rank(part, step, x, _TOP + row * index) for index, part in enumerate(shown)]
    axis = _axis(x, end - zero, bottom + 8, width)
    label = f"Step {step} on every rank: computing, waiting, collectives under way"
    return picture(width, bottom + _BOTTOM, label, axis, *rows)


def _axis(x: Scale, seconds: float, bottom: float, width: int) -> Markup:
    unit, factor = ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    ticks = round_ticks(0, seconds * factor, 4 if width < 500 else 9)
    drawn = [el("text", unit, x=0, y=bottom + 16, class_="axis-title")]
    for tick in ticks:
        at = x(x.low + tick / factor)
        drawn.append(el("line", x1=at, x2=at, y1=0, y2=bottom, class_="grid"))
        drawn.append(el("text", f"{tick:,.6g}", x=at, y=bottom + 16, class_="tick middle"))
    return join(drawn)


def _rank(part: Part, step: int, x: Scale, top: float) -> Markup:
    name = el("text", f"rank {part.rank}", x=0, y=top + 16, class_="row-label")
    blocks = join(_drawn(block, x, top) for block in _blocks(part, step, x))
    return el("g", name, _under_way(part, step, x, top + _BAND + 2), blocks)


def _under_way(part: Part, step: int, x: Scale, top: float) -> Markup:
    """Each collective from its Start to its Wait, cut at the step's borders; several darken."""
    began, ended = _span(part, step)
    track = _rect("track", x(began), x(ended), top, _THIN)
    found = []
    for transfer in transfers(part):
        start = transfer.begun.began if transfer.begun else began
        stop = transfer.awaited.ended if transfer.awaited else ended
        start, stop = max(start, began), min(stop, ended)
        if start < stop:
            text = f"{transfer.what.get('op')} over {transfer.what.get('axis')}\n"
            text += f"{bytes_text(transfer.what.get('bytes', 0))} for {seconds_text(stop - start)}"
            found.append(_rect("under-way", x(start), x(stop), top, _THIN, text))
    return track + join(found)


def _blocks(part: Part, step: int, x: Scale) -> Iterator[_Block]:
    """The step's slices; those too narrow to be seen are taken together with their neighbours."""
    last: _Block | None = None
    for piece in part.slices:
        if piece.step != step:
            continue
        block = _Block(_class(piece), piece.began, piece.ended, piece)
        if last is None:
            last = block
            continue
        narrow = (_narrow(last, x), _narrow(block, x))
        if all(narrow) or (any(narrow) and last.class_ == block.class_):
            last = _joined(last, block)
        else:
            yield last
            last = block
    if last is not None:
        yield last


def _narrow(block: _Block, x: Scale) -> bool:
    return x(block.ended) - x(block.began) < 1.5


def _joined(left: _Block, right: _Block) -> _Block:
    """Both, in the colour of the longer slice."""
    longer = max(left, right, key=lambda block: block.longest.ended - block.longest.began)
    count = left.count + right.count
    return _Block(longer.class_, left.began, right.ended, longer.longest, count)


def _class(piece: Slice) -> str:
    if piece.computes:
        return "part-forward" if piece.what.get("phase") == "forward" else "part-compute"
    return _CLASSES.get(piece.kind, "part-update")


def _drawn(block: _Block, x: Scale, top: float) -> Markup:
    what = block.longest.what
    lines = [str(what["name"]), seconds_text(block.ended - block.began)]
    if block.count > 1:
        lines[0] += f" and {block.count - 1} more"
    if what.get("serves"):
        lines.append(", ".join(what["serves"][:3]) + (" …" if len(what["serves"]) > 3 else ""))
    if what.get("lines"):
        lines.append(", ".join(what["lines"][:4]))
    left, right = x(block.began), x(block.ended)
    gap = 0.5 if right - left > 3 else 0.0
    return _rect(block.class_, left, right - gap, top, _BAND, "\n".join(lines))


def _rect(
    class_: str, left: float, right: float, top: float, height: float, text: str = ""
) -> Markup:
    """To a hundredth of a pixel, since blocks are narrow."""
    width = f"{max(right - left, 0.25):.2f}"
    inner = [tip(text)] if text else []
    return el("rect", *inner, class_=class_, x=f"{left:.2f}", y=top, width=width, height=height)
