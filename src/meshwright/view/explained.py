"""What `mw plan --explain` adds to the plan's table: mesh, block, parameters, what was lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.program.fold import folded, pattern_of
from meshwright.view.accounts import Attention, Conflict, Fallback, alike
from meshwright.view.layouts import dims_of, owed
from meshwright.view.picture import block_text, mesh_text
from meshwright.view.runfile import Parameter, parse_setup
from meshwright.view.tables import Lines
from meshwright.view.units import bytes_text

__all__ = ["explained", "fallback_table"]


def explained(run: Mapping[str, Any]) -> RenderableType:
    """All that a decoded `run.json` says of a plan beside `plan_table`."""
    setup = parse_setup(run)
    parts: list[RenderableType] = []
    if len(setup.ranks) > 1:
        parts += [Text(), mesh_text(setup)]
    if setup.block.stations:
        parts += [Text(), block_text(setup.block, setup.microbatches)]
    if setup.parameters:
        parts += [Text(), _parameters(setup.parameters)]
    if setup.attention:
        parts += [Text(), _attention(setup.attention)]
    parts += [Text(), _conflicts(setup.conflicts), Text(), fallback_table(setup.fallbacks)]
    return Group(*parts)


def _parameters(parameters: Sequence[Parameter]) -> RenderableType:
    """The layouts of every parameter, those of repeated layers as one."""
    names = [parameter.name for parameter in parameters]
    groups: dict[tuple[object, ...], list[Parameter]] = {}
    for p in parameters:
        key = (pattern_of(p.name), p.shape, p.dtype, p.weights, p.gradients, p.optimizer)
        groups.setdefault(key, []).append(p)
    rows: list[tuple[str, ...]] = [("parameter", "", "weights", "gradients", "optimizer")]
    for group in groups.values():
        first, number = group[0], len(group)
        weights = _dims(first.shape, first.weights)
        beside = (
            _beside(first.shape, lies, weights) for lies in (first.gradients, first.optimizer)
        )
        name = folded([p.name for p in group], names)
        rows.append((name, f"×{number:,}" if number > 1 else "", weights, *beside))
    return Lines(lambda width: _aligned(rows, width))


def _aligned(rows: Sequence[Sequence[str]], width: int) -> Iterator[Text]:
    """Rows in columns, the first one a head; the first cell has a line of its own where needed."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    beside = sum(sizes) + 2 * len(sizes) - 2 <= width
    for number, (name, *cells) in enumerate(rows):
        rest = "  ".join(f"{cell:{size}}" for cell, size in zip(cells, sizes[1:], strict=True))
        between = "  " if beside else "\n    "
        first = f"{name:{sizes[0]}}" if beside else name
        yield Text(f"{first}{between}{rest}".rstrip(), "" if number else "dim")


def _dims(shape: Sequence[int], layout: str) -> str:
    """Dims with the axes that split them."""
    return " × ".join(dims_of(shape, layout)) or "scalar"


def _beside(shape: Sequence[int], layout: str, weights: str) -> str:
    """How gradients or optimizer state lie, beside how the weights do."""
    if layout in ("", "none"):
        return "none"
    dims, owes = _dims(shape, layout), owed(layout)
    words = [dims] if dims != weights else []
    words += [f"partial over {' and '.join(owes)}"] if owes else []
    return ", ".join(words) or "the same"


def _attention(found: Sequence[Attention]) -> RenderableType:
    """How attention meets sequences that are split."""
    lines = [Text("Attention over split sequences", "bold")]
    for one in found:
        times = f" ×{one.count:,}" if one.count > 1 else ""
        lines.append(Text(f"  {one.form}{times}  {_where(one.source, one.module)}"))
        lines.append(Text(f"    {one.why}", "dim"))
    return Group(*lines)


def _conflicts(conflicts: Sequence[Conflict]) -> RenderableType:
    """Ops whose operands lay differently: what won, and what the loser costs."""
    if not conflicts:
        return Text("No op's operands wanted different splits.")
    lines = [Text("Ops whose operands wanted different splits", "bold")]
    for found in alike(conflicts):
        cost = f"moves {bytes_text(found.bytes)}" if found.bytes else "costs nothing more"
        times = f" ×{found.count:,}" if found.count > 1 else ""
        lines += [
            Text(f"  {found.op}{times}  {_where(found.source, found.module)}"),
            Text(f"    {found.winner} won"),
            Text(f"    {found.loser} lost: to {found.wanted}, {cost}", "dim"),
        ]
    return Group(*lines)


def fallback_table(fallbacks: Sequence[Fallback]) -> RenderableType:
    """Ops without a rule: every rank gathers their operands and computes all of them."""
    if not fallbacks:
        return Text("Every op has a rule.")
    lines = [Text("Ops without a rule, computed whole on every rank", "bold")]
    for found in alike(fallbacks):
        times = f" ×{found.count:,}" if found.count > 1 else ""
        gathers = f"gathers {bytes_text(found.bytes)}" if found.bytes else "gathers nothing"
        where = _where(found.source, found.module)
        lines.append(Text(f"  {found.op}{times}  {where}, {gathers}", "yellow"))
        lines.append(Text(f"    {found.remedy}"))
    return Group(*lines)


def _where(source: str, module: str) -> str:
    return "  ".join(word for word in (source, module) if word) or "the loss"
