"""Pictures of the results: ratios against targets, collectives by size, loss curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import loss_curve, reach
from benchmarks.harness.result import Result, from_json
from benchmarks.harness.statistics import HOLDS, MISSES, OPEN
from benchmarks.special import text

# Okabe and Ito's colours, which differ for the colour-blind too; shapes say the same again.
LOOK = {HOLDS: ("#009E73", "o"), MISSES: ("#D55E00", "X"), OPEN: ("#8A8A8A", "D")}
INK, FAINT = "#222222", "#D9D9D9"
LINES = {"ours": ("#0072B2", "o"), "gloo": ("#D55E00", "s"), "copy": ("#8A8A8A", "^")}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "meshwright",
    "figure.facecolor": "white",
}
TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
APART = (reach.COLLECTIVES, reach.CROWDED, reach.GPU)


def draw(raw: Mapping[str, Any], folder: Path) -> list[str]:
    """Every picture there are numbers for; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [from_json(r) for group in raw["groups"].values() for r in group["results"]]
    groups = raw["groups"]
    drawn: dict[str, Callable[[], Figure]] = {}
    shown = [r for r in results if r.section not in APART and r.found and r.key != "bf16-loss"]
    if shown:
        drawn["training.svg"] = lambda: training(shown)
    if "collectives" in groups:
        drawn["collectives.svg"] = lambda: collectives(groups["collectives"]["raw"]["cells"])
    if "curve" in groups:
        drawn["loss.svg"] = lambda: losses(groups["curve"]["raw"]["losses"])
    with mpl.rc_context(STYLE):
        for name, figure in drawn.items():
            made = figure()
            made.savefig(folder / name, bbox_inches="tight", metadata={"Date": None})
    return list(drawn)


def training(results: Sequence[Result]) -> Figure:
    """Every ratio as one of speeds, ours over theirs, with its interval and its target."""
    rows: list[Result | str] = []
    for section in (*reach.SECTIONS, reach.CONTROLS):
        mine = [r for r in results if r.section == section]
        rows += [section, *mine] if mine else []
    figure = Figure(figsize=(8.6, 0.6 + 0.235 * len(rows)))
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        if isinstance(row, str):
            axes.text(-0.01, y, row, transform=axes.get_yaxis_transform(), ha="right", va="center",
                      weight="bold")  # fmt: skip
        else:
            _ratio(axes, y, row)
    axes.axvline(1.0, color=INK, linewidth=0.8, zorder=1)
    speeds = [v for r in results if r.found for v in _speeds(r)]
    scale = min(0.85, *speeds) / 1.03, max(1.25, *speeds) * 1.03
    axes.set(xscale="log", xlim=scale, ylim=(len(rows) - 0.3, -0.8), yticks=[])
    ticks = [t for t in TICKS if scale[0] < t < scale[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("speed, ours over the other; median and 95 % interval, log scale")
    _legend(axes)
    return figure


def _ratio(axes: Axes, y: int, result: Result) -> None:
    """A line of the table."""
    colour, shape = LOOK[result.verdict]
    *targets, median, low, high = _speeds(result)
    axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=3)
    axes.plot(median, y, shape, color=colour, markersize=5.5, zorder=4,
              markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    for target in targets:
        axes.plot([target, target], [y - 0.36, y + 0.36], color=INK, linewidth=1.6, zorder=2)
    place = {"transform": axes.get_yaxis_transform(), "va": "center"}
    axes.text(-0.01, y, result.what, ha="right", **place)
    axes.text(1.01, y, f"{median:.2f}", ha="left", color=colour, **place)


def _speeds(result: Result) -> list[float]:
    """Target or targets, median and ends of a line; ratios of times are turned over."""
    found = result.found
    assert found is not None
    around = (1 - result.target, 1 + result.target)
    targets = around if result.sense == "within" else (result.target,)
    ends = (found.median if math.isinf(v) else v for v in (found.low, found.high))
    values = [*targets, found.median, *ends]
    return [1 / v for v in values] if result.sense == "at most" else values


def _legend(axes: Axes) -> None:
    for said, (colour, shape) in LOOK.items():
        axes.plot([], [], shape, color=colour, label=said, markersize=5.5)
    axes.plot([], [], "|", color=INK, markersize=9, markeredgewidth=1.6, label="target")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, frameon=False, borderaxespad=0.2
    )


def collectives(cells: Sequence[Mapping[str, Any]]) -> Figure:
    """Time by size: a row of panels per number of ranks, a panel per op."""
    worlds = sorted({c["ranks"] for c in cells})
    ops = list(dict.fromkeys(c["op"] for c in cells))
    figure = Figure(figsize=(3.1 * len(ops), 2.7 * len(worlds)), layout="constrained")
    panels = figure.subplots(len(worlds), len(ops), squeeze=False, sharex=True, sharey=True)
    for row, ranks in zip(panels, worlds, strict=True):
        for axes, op in zip(row, ops, strict=True):
            mine = [c for c in cells if c["op"] == op and c["ranks"] == ranks]
            _times(axes, sorted(mine, key=lambda c: c["bytes"]))
            axes.set_title(f"{op.replace('_', '-')}, {ranks} ranks", fontsize=9, weight="bold")
        row[0].set_ylabel("time of a call")
    panels[0][0].legend(frameon=False, loc="upper left")
    return figure


def _times(axes: Axes, cells: Sequence[Mapping[str, Any]]) -> None:
    sizes = [c["bytes"] for c in cells]
    for name, (colour, shape) in LINES.items():
        times = [statistics.median(c["seconds"][name]) for c in cells]
        axes.plot(sizes, times, f"-{shape}", color=colour, label=name, markersize=4, linewidth=1.4)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [text(size) for size in sizes], rotation=45, ha="right", fontsize=8)
    ticks = {
        1e-6: "1 us",
        1e-5: "10 us",
        1e-4: "100 us",
        1e-3: "1 ms",
        1e-2: "10 ms",
        0.1: "100 ms",
        1: "1 s",
    }
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def losses(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Two curves, and their ratio by tens of steps."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (name, losses_), colour, dash in zip(
        curves.items(), ("#8A8A8A", "#0072B2"), ("-", "--"), strict=True
    ):
        steps = range(1, len(losses_) + 1)
        above.plot(steps, losses_, dash, color=colour, linewidth=1.6, label=name)
    above.set_ylabel("loss")
    above.legend(frameon=False)
    ratios = loss_curve.ratios(curves["bf16"], curves["float32"])
    middles = [loss_curve.BLOCK * (i + 0.5) for i in range(len(ratios))]
    below.axhspan(0.99, 1.01, color=FAINT, linewidth=0)
    below.plot(middles, ratios, "-o", color="#0072B2", markersize=3.5, linewidth=1.2)
    below.set(xlabel="step", ylabel="bf16 / float32", ylim=(0.97, 1.03))
    return figure
