"""The mesh and one block as text, for a terminal of any width."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.view.accounts import Block, Collective, Station
from meshwright.view.chart.block import of_state
from meshwright.view.layouts import change
from meshwright.view.runfile import Axis, Setup
from meshwright.view.tables import Lines, plain_table
from meshwright.view.traffic import added, hidden_text
from meshwright.view.units import bytes_text

__all__ = ["block_text", "mesh_text"]

_ACROSS, _DOWN, _GRIDS = 8, 16, 4


def mesh_text(setup: Setup) -> RenderableType:
    """The ranks by their coordinates: the last axis across, the one before it down."""
    axes = [axis for axis in setup.axes if axis[1] > 1] or list(setup.axes[:1])
    wanted = [name for name, _ in axes]
    numbers = {
        tuple(at for name, at in rank.coordinates if name in wanted): rank.rank
        for rank in setup.ranks
    }
    outer, down, across = axes[:-2], axes[-2:-1], axes[-1:]
    places = list(itertools.product(*(range(size) for _, size in outer)))
    grids = [_grid(outer, place, down, across, numbers) for place in places[:_GRIDS]]
    if len(places) > _GRIDS:
        grids.append(Text(f"and {len(places) - _GRIDS} more such parts", "dim"))
    return Group(*grids)


def _grid(
    outer: Sequence[Axis],
    place: tuple[int, ...],
    down: Sequence[Axis],
    across: Sequence[Axis],
    numbers: dict[tuple[int, ...], int],
) -> RenderableType:
    """The ranks at one place of the outer axes."""
    title = ", ".join(f"{name} {at}" for (name, _), at in zip(outer, place, strict=True))
    columns = [f"{name} {k}" for name, size in across for k in range(min(size, _ACROSS))]
    more = [f"… {size:,} in all" for _, size in across if size > _ACROSS]
    table = plain_table(title or "mesh", *columns, *more)
    rows: list[tuple[int, ...]] = [(at,) for _, size in down for at in range(min(size, _DOWN))] or [
        ()
    ]
    for row in rows:
        ranks = [numbers.get((*place, *row, k)) for k in range(len(columns))]
        head = " ".join(f"{name} {at}" for (name, _), at in zip(down, row, strict=True))
        table.add_row(Text(head), *("" if rank is None else f"rank {rank:,}" for rank in ranks))
    for _, size in down:
        if size > _DOWN:
            table.add_row(Text(f"… {size:,} in all", "dim"))
    return table


def block_text(block: Block, microbatches: int = 1) -> RenderableType:
    """The modules of a block from top to bottom, and the collectives between them."""
    return Lines(lambda width: _block(block, microbatches, width))


def _block(block: Block, microbatches: int, width: int) -> Iterator[Text]:
    title = Text(block.name or "the model", "bold")
    title.append(f", one of {block.count:,} alike" if block.count > 1 else "", "")
    title.append(f"; a micro-batch of {microbatches:,}" if microbatches > 1 else "", "")
    yield title
    cells = [(s.module or block.name or "the model", _reads(s), _makes(s)) for s in block.stations]
    heads = ("module", "reads", "makes")
    sizes = [max(len(row[k]) for row in (heads, *cells)) for k in range(3)]
    beside = sum(sizes) + 4 <= width
    if beside:
        yield _row(heads, sizes, beside=True, style="dim")
    for station, row in zip(block.stations, cells, strict=True):
        yield from _between("↓", station.before)
        yield _row(row, sizes, beside=beside)
        yield from _between("↑", station.backward)
    yield from _of_state(block)


def _row(cells: Sequence[str], sizes: Sequence[int], *, beside: bool, style: str = "") -> Text:
    module, reads, makes = cells
    if beside:
        return Text(f"{module:{sizes[0]}}  {reads:{sizes[1]}}  {makes}".rstrip(), style)
    return Text(f"{module:{sizes[0]}}  {f'{reads} ' if reads else ''}→ {makes}", style)


def _reads(station: Station) -> str:
    """The dims of its weights; of those beside a matrix nothing is said."""
    most = max((len(dims) for _, dims in station.weights), default=0)
    found = [" × ".join(dims) for _, dims in station.weights if len(dims) == most]
    return ", ".join(dict.fromkeys(found))


def _makes(station: Station) -> str:
    owes = f", partial over {' and '.join(station.owes)}" if station.owes else ""
    return (" × ".join(station.dims) or "a scalar") + owes


def _between(sign: str, rows: Sequence[Collective]) -> Iterator[Text]:
    """What is moved of the values that modules hand on."""
    for row in added(row for row in rows if not row.state):
        yield _moves(sign, row, change(row.why, row.axis))


def _moves(sign: str, row: Collective, what: str = "") -> Text:
    words = (f"{row.op} over {row.axis}", bytes_text(row.bytes), what, hidden_text(row))
    return Text(f"  {sign} {', '.join(word for word in words if word)}", "yellow")


def _of_state(block: Block) -> Iterator[Text]:
    for sign, what, row in of_state(block):
        yield _moves(sign or " ", row, what)
