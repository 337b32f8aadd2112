"""A run's pipeline as a table: what each stage computes, holds and sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.view.fields import finite, integer, mapping, mappings, text
from meshwright.view.units import bytes_text, count_text, percent_text

__all__ = ["pipeline_table", "sent_bytes"]


def pipeline_table(run: Mapping[str, Any]) -> RenderableType | None:
    """The stages of the plan in a decoded `run.json`, and its warnings; None without a pipeline."""
    piped = mapping(run.get("pipeline"))
    if not piped:
        return None
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("stage", "rank", "begins with", "ends with"):
        table.add_column(title, overflow="fold")
    stages = mappings(piped.get("stages"))
    ages = any("versions" in stage for stage in stages)
    for title in ("tensors", "weights", *(("versions", "minibatches behind") if ages else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            str(integer(stage.get("stage"))),
            str(integer(stage.get("rank"))),
            Text(text(stage.get("begins"))),
            Text(text(stage.get("ends"))),
            count_text(integer(stage.get("parameters"))),
            bytes_text(integer(stage.get("bytes"))),
            *(_age(stage) if ages else ()),
        )
    notes = piped.get("notes")
    told = [Text(text(note), "yellow") for note in (notes if isinstance(notes, list) else [])]
    return Group(Text(_head(piped)), table, *told)


def _age(stage: Mapping[str, Any]) -> tuple[str, str]:
    """Versions of its weights that a stage keeps, and how old those are that gradients are of."""
    given = stage.get("staleness")
    ages = sorted({integer(age) for age in given}) if isinstance(given, list) else []
    return count_text(integer(stage.get("versions"), 1)), " to ".join(map(count_text, ages))


def _head(piped: Mapping[str, Any]) -> str:
    """`schedule 1f1b, 8 micro-batches, bubble 11 % at equal stages; a rank sends at most 4 KiB`."""
    parts = integer(piped.get("microbatches"), 1)
    words = [f"schedule {text(piped.get('schedule'))}"]
    words.append(f"{count_text(parts)} micro-batch{'es' * (parts != 1)}")
    share = finite(piped.get("bubble"))
    if share is not None:
        words.append(f"bubble {percent_text(share)} at equal stages")
    guess = finite(piped.get("estimated bubble"))
    if guess is not None:
        words[-1] += f", about {percent_text(guess)} at these"
    return f"{', '.join(words)}; a rank sends at most {bytes_text(_most_sent(piped))} a step"


def sent_bytes(run: Mapping[str, Any]) -> int:
    """Bytes that the rank which sends most to other stages sends in a step."""
    return _most_sent(mapping(run.get("pipeline")))


def _most_sent(piped: Mapping[str, Any]) -> int:
    return max((integer(each.get("sent")) for each in mappings(piped.get("traffic"))), default=0)
