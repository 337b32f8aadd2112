"""One page about a run, `report.html`: self-contained, readable from a file, on paper, in the dark.

The page loads nothing: style, script and pictures are in it, and a content security policy in its
head forbids all else, with the script named by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from meshwright.errors import StorageError
from meshwright.view import findings, units
from meshwright.view.accounts import alike
from meshwright.view.advice import advise
from meshwright.view.chart.block import block_picture
from meshwright.view.chart.gauge import error_gauge
from meshwright.view.chart.loss import loss_chart, spark_line
from meshwright.view.chart.memory import MOST_BARS, equal_bills, memory_chart, part_class
from meshwright.view.chart.mesh import MOST_CELLS, mesh_picture
from meshwright.view.chart.pipeline import kinds_of
from meshwright.view.chart.pipeline import pipeline as pipeline_chart
from meshwright.view.chart.smooth import FEW
from meshwright.view.chart.tape import layout_tape
from meshwright.view.chart.time import time_chart, total_bar
from meshwright.view.chart.timeline import KINDS as KINDS_OF_TIME
from meshwright.view.chart.timeline import MOST_RANKS, timeline, typical_step
from meshwright.view.commands import target, train_command, verify_command
from meshwright.view.folder import Folder, read_folder
from meshwright.view.history import History
from meshwright.view.holdings import modules, shape_text
from meshwright.view.layouts import KINDS
from meshwright.view.measured import difference_text
from meshwright.view.measures import measure
from meshwright.view.overlap import overlap
from meshwright.view.parts import Part
from meshwright.view.pipelined import Pipelined, pipelined
from meshwright.view.runfile import Setup
from meshwright.view.svg import both_widths
from meshwright.view.trace import write_trace
from meshwright.view.traffic import hidden_text, phases

__all__ = ["render_report", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        UsageError: `run_dir` is no run folder.
        StorageError: a file in it cannot be read, or the page cannot be written.
    """
    folder = read_folder(run_dir)
    if folder.trace and not (run_dir / "trace.json").exists():  # a rank died before it was merged
        write_trace(run_dir)
    page = render_report(folder)
    path = run_dir / "report.html"
    aside = run_dir / ".report.html.tmp"
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    return path


def render_report(folder: Folder) -> str:
    """The page, as text."""
    environment = Environment(
        loader=PackageLoader("meshwright.view", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.jinja")
    return template.render(
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_digest=digest,
        **_facts(folder),
        **_pictures(folder),
    )


def _asset(name: str) -> str:
    return files("meshwright.view").joinpath(name).read_text(encoding="utf-8")


def _facts(folder: Folder) -> dict[str, Any]:
    setup, measures = folder.setup, measure(folder)
    staged = pipelined(folder.trace, typical_step(folder.trace))
    return {
        "run": folder,
        "setup": setup,
        "measures": measures,
        "history": folder.history,
        "smooth": len(folder.history.steps) >= FEW,
        "verification": folder.verification,
        "target": target(setup),
        "started": _when(setup.started),
        "modules": modules(setup.parameters, setup.axes),
        "phases": phases(setup.collectives),
        "fallbacks": alike(setup.fallbacks),
        "conflicts": [found for found in alike(setup.conflicts) if found.bytes],
        "advice": advise(folder, measures),
        "train_command": train_command(setup),
        "verify_command": verify_command(setup),
        "kinds": KINDS,
        "findings": {
            "mesh": findings.mesh_finding(setup),
            "axes": findings.axes_text(setup),
            "block": findings.block_finding(setup.block),
            "loss": findings.loss_finding(folder.history, measures),
            "time": findings.time_finding(measures),
            "traffic": findings.traffic_finding(measures),
            "memory": findings.memory_finding(setup),
            "verification": findings.verification_finding(folder),
            "timeline": findings.timeline_finding(overlap(folder.trace)),
            "pipeline": findings.pipeline_finding(staged) if staged else "",
        },
        "traced": _traced(folder.trace),
        "timeline_kinds": KINDS_OF_TIME,
        **_pipeline(staged),
        "memory_parts": _memory_parts(setup),
        "hidden_bars": max(0, len(equal_bills(setup.memory)) - MOST_BARS),
        "hidden_ranks": max(0, len(setup.ranks) - MOST_CELLS),
    }


def _pictures(folder: Folder) -> dict[str, Any]:
    setup, history, measures = folder.setup, folder.history, measure(folder)
    time = measures.time
    return {
        "mesh_picture": both_widths(partial(mesh_picture, setup)),
        "block_picture": both_widths(partial(block_picture, setup.block)),
        "loss_picture": both_widths(partial(loss_chart, history)),
        "time_total": both_widths(partial(total_bar, time)) if time else "",
        "time_picture": both_widths(partial(time_chart, history.steps)) if time else "",
        "timeline": _timeline(folder.trace),
        "memory_picture": both_widths(partial(memory_chart, setup.memory)),
        "sparks": _sparks(history),
        "tape": layout_tape,
        "gauge": error_gauge,
    }


def _timeline(parts: Sequence[Part]) -> str:
    step = typical_step(parts)
    return both_widths(partial(timeline, parts, step)) if step else ""


def _pipeline(step: Pipelined | None) -> dict[str, Any]:
    """A traced step of a pipeline and its legend."""
    return {
        "pipeline_picture": both_widths(partial(pipeline_chart, step)) if step else "",
        "pipeline_kinds": kinds_of(step) if step else (),
    }


def _traced(parts: Sequence[Part]) -> dict[str, Any]:
    """What the caption of the timeline says."""
    steps = sorted({step for part in parts for step in part.steps})
    return {
        "step": typical_step(parts),
        "steps": f"{steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else "",
        "error": max((part.error for part in parts), default=0.0),
        "hidden": max(0, len(parts) - MOST_RANKS),
    }


def _memory_parts(setup: Setup) -> tuple[tuple[str, str], ...]:
    """Each named part of memory and the class of its colour, for the legend."""
    names = chain.from_iterable(entry.parts for entry in setup.memory)
    return tuple((name, part_class(name)) for name in dict.fromkeys(name for name, _ in names))


def _sparks(history: History) -> list[tuple[str, Markup, float]]:
    """The user's own metrics and the learning rate: name, course, last value; at most twelve."""
    courses: dict[str, list[tuple[int, float]]] = {}
    for step in history.steps:
        for name, value in step.metrics:
            courses.setdefault(name, []).append((step.step, value))
    shown = list(courses.items())[:12]
    return [(name, spark_line(points), points[-1][1]) for name, points in shown]


def _when(started: str) -> str:
    """A start time as people write it; anything that is no time stays as it is."""
    try:
        moment = datetime.fromisoformat(started)
    except ValueError:
        return started
    text = f"{moment.day} {moment:%B %Y, %H:%M}"
    return f"{text} UTC" if moment.utcoffset() == UTC.utcoffset(None) else text


_UNIT = re.compile(r"(?<=[0-9]) (?=([KMGTP]i)?B\b|[mµ]?s\b|min\b|%)")


def _unbroken(text: str) -> str:
    """`text` with no line break between a number and its unit."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


def _quantity(text: str) -> Markup:
    """Number and unit apart, so that columns of them line up."""
    number, _, unit = text.partition(" ")
    return Markup('<span class="q">{}<span class="u">{}</span></span>').format(number, unit)


_FILTERS = {
    "bytes": lambda size: _quantity(units.bytes_text(size)),
    "bytes_text": units.bytes_text,
    "count": units.count_text,
    "difference": difference_text,
    "error": units.error_text,
    "hidden": hidden_text,
    "percent": units.percent_text,
    "seconds": units.seconds_text,
    "shape": shape_text,
    "unbroken": _unbroken,
    "value": units.value_text,
}
