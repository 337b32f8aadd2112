"""What `run.json` says a step moves, and why: collectives, fallbacks, conflicts, one block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from meshwright.program.fold import folded, pattern_of
from meshwright.view.fields import finite, integer, mapping, mappings, text

__all__ = [
    "Attention", "Block", "Collective", "Conflict", "Fallback", "Station", "alike",
    "parse_attention", "parse_block", "parse_collective", "parse_conflict", "parse_fallback",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective of one step: `bytes` are what a rank moves for all its `count` calls.

    Of these calls `exposed` have nothing computed beside them; None where that was not recorded.
    """

    op: str
    axis: str
    bytes: int
    count: int
    exposed: int | None
    beside: int
    value: str
    source: str
    module: str
    why: str
    phase: str

    @property
    def state(self) -> str:
        """`model` or `gradient`, where it moves a parameter's; else empty."""
        kind = self.value.partition("/")[0]
        return kind if kind in ("model", "gradient") else ""


@dataclass(frozen=True, slots=True)
class Fallback:
    """An op without a rule, computed whole: what it gathers per step, and the rule to declare."""

    op: str
    source: str
    module: str
    phase: str
    count: int
    bytes: int
    remedy: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """An op whose operands wanted different splits over `axis`: who won, what the loser costs."""

    op: str
    axis: str
    source: str
    module: str
    phase: str
    winner: str
    loser: str
    wanted: str
    bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Attention:
    """The form that attention over split sequences takes at `count` places, and why."""

    form: str
    why: str
    source: str
    module: str
    count: int


@dataclass(frozen=True, slots=True)
class Station:
    """What one module of a block computes; dims are written with the axes that split them."""

    module: str
    source: str
    weights: tuple[tuple[str, tuple[str, ...]], ...]
    dims: tuple[str, ...]
    owes: tuple[str, ...]
    before: tuple[Collective, ...]
    backward: tuple[Collective, ...]
    update: tuple[Collective, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A layer, `count` of which are alike; empty where none was recorded."""

    name: str
    count: int
    stations: tuple[Station, ...]


def parse_collective(entry: Mapping[str, Any]) -> Collective:
    """One collective; what is missing is empty."""
    exposed = finite(entry.get("exposed"))
    return Collective(
        op=text(entry.get("op")),
        axis=text(entry.get("axis")),
        bytes=integer(entry.get("bytes")),
        count=integer(entry.get("count"), 1),
        exposed=None if exposed is None else int(exposed),
        beside=integer(entry.get("beside")),
        value=text(entry.get("value")),
        source=text(entry.get("source")),
        module=text(entry.get("module")),
        why=text(entry.get("why")),
        phase=text(entry.get("phase"), "other"),
    )


def parse_fallback(entry: Mapping[str, Any]) -> Fallback:
    """One op without a rule."""
    return Fallback(
        op=text(entry.get("op")),
        source=text(entry.get("source")),
        module=text(entry.get("module")),
        phase=text(entry.get("phase")),
        count=integer(entry.get("count"), 1),
        bytes=integer(entry.get("bytes")),
        remedy=text(entry.get("remedy")),
    )


def parse_conflict(entry: Mapping[str, Any]) -> Conflict:
    """One conflict."""
    return Conflict(
        op=text(entry.get("op")),
        axis=text(entry.get("axis")),
        source=text(entry.get("source")),
        module=text(entry.get("module")),
        phase=text(entry.get("phase")),
        winner=text(entry.get("winner")),
        loser=text(entry.get("loser")),
        wanted=text(entry.get("wanted")),
        bytes=integer(entry.get("bytes")),
        count=integer(entry.get("count"), 1),
    )


def parse_attention(entry: Mapping[str, Any]) -> Attention:
    """One attention; those of repeated layers come as one."""
    return Attention(
        form=text(entry.get("form")),
        why=text(entry.get("why")),
        source=text(entry.get("source")),
        module=text(entry.get("module")),
        count=integer(entry.get("count"), 1),
    )


def parse_block(value: Any) -> Block:
    """The block."""
    entry = mapping(value)
    return Block(
        name=text(entry.get("name")),
        count=integer(entry.get("count"), 1),
        stations=tuple(map(_station, mappings(entry.get("stations")))),
    )


Lost = TypeVar("Lost", Fallback, Conflict)


def alike(lost: Iterable[Lost]) -> list[Lost]:
    """Those of repeated layers as one, in their order."""
    groups: dict[Lost, list[Lost]] = {}
    for found in lost:
        key = replace(found, module=pattern_of(found.module), count=0, bytes=0)
        groups.setdefault(key, []).append(found)
    return [
        replace(
            key,
            module=folded(found.module for found in group),
            count=sum(found.count for found in group),
            bytes=sum(found.bytes for found in group),
        )
        for key, group in groups.items()
    ]


def _station(entry: Mapping[str, Any]) -> Station:
    weights = entry.get("weights")
    pairs = [p for p in (weights if isinstance(weights, list | tuple) else ()) if _is_pair(p)]

    def rows(key: str) -> tuple[Collective, ...]:
        return tuple(map(parse_collective, mappings(entry.get(key))))

    return Station(
        module=text(entry.get("module")),
        source=text(entry.get("source")),
        weights=tuple((text(name), _texts(dims)) for name, dims in pairs),
        dims=_texts(entry.get("dims")),
        owes=_texts(entry.get("owes")),
        before=rows("before"),
        backward=rows("backward"),
        update=rows("update"),
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(text, value)) if isinstance(value, list | tuple) else ()
